"""Reading teacher outputs from the cache against reading the same bytes from a raw numpy memory map.

Both read the same shuffled batches of 64 examples and make the same new float32 array of each. The raw file holds
nothing but the numbers in order of the examples, and its reader, written for this one file, is two lines of numpy: it
checks nothing, knows no dtype and no missing output. The cache's reader is `TeacherCache.lookup`, with all its checks.
Every file is in the page cache, since both are read once before they are timed: this compares the work, not the disk.

* logits of 2 classes, 100,000 examples: 0.8 MB, which the cache holds in memory
* vectors of 384, 100,000 examples: 154 MB, which the cache holds in memory
* hidden states of 384 for 8 to 40 tokens an example, 8,500 examples, about 313 MB, which the cache reads from its
  mapped shards; both readers make the padded `(64, L, 384)` batch. `unpadded` lets the raw reader leave the tokens one
  after the other, which writes fewer bytes than a batch has; it is reported without a goal

The ratio is raw seconds over the cache's seconds of a round: 1 is as fast as the raw file. Bytes per example are those
of all files of the cache, manifest included, over those of the numbers alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import Measure, interleave, ratios
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.shards import Limits
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.types import ModelOutput

BATCH = 64
WIDTH = 384
ROUNDS = 9

Array = NDArray[np.float32]


def run() -> list[Measure]:
    """Measure all three."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="cache_io_") as folder:
        return [
            *_fixed(Path(folder), "logits of 2 classes", generator.standard_normal((100_000, 2), np.float32)),
            *_fixed(Path(folder), "vectors of 384", generator.standard_normal((100_000, WIDTH), np.float32)),
            *_hidden(Path(folder), generator.integers(8, 41, 8_500), generator),
        ]


def _fixed(folder: Path, name: str, rows: Array) -> list[Measure]:
    """A fixed-width output: stored as logits, since it is all the same to the cache."""
    cache = TeacherCache.create(folder / name, {"benchmark": name}, len(rows), Storage())
    for index in torch.randperm(len(rows)).split(1000):
        cache.add(index, ModelOutput(torch.from_numpy(rows[index.numpy()])))
    cache = _reopened(cache)
    raw = _raw(folder / "raw", rows)
    batches = _batches(len(rows))

    def read_raw() -> None:
        for batch in batches:
            raw[batch]

    tensors = [torch.from_numpy(batch) for batch in batches]

    def read_cache() -> None:
        for batch in tensors:
            cache.lookup(batch)

    for batch, tensor in zip(batches, tensors, strict=True):
        assert np.array_equal(cache.lookup(tensor).logits.numpy(), raw[batch])
    return [_speed(name, {"raw": read_raw, "cache": read_cache}), _size(name, cache, rows.nbytes)]


def _hidden(folder: Path, lengths: NDArray[np.int64], generator: np.random.Generator) -> list[Measure]:
    """An output per token, larger than what is held in memory, beside logits of 2 classes."""
    name = "hidden states of 384"
    flat = generator.standard_normal((int(lengths.sum()), WIDTH), np.float32)
    start = np.cumsum(lengths) - lengths
    raw = _raw(folder / "raw", flat)

    def tokens(batch: NDArray[np.int64]) -> NDArray[np.int64]:
        n = lengths[batch]
        return np.repeat(start[batch] - (np.cumsum(n) - n), n) + np.arange(n.sum())

    def mask_of(batch: NDArray[np.int64]) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = np.arange(lengths[batch].max()) < lengths[batch][:, None]
        return mask

    def padded(batch: NDArray[np.int64], mask: NDArray[np.bool_]) -> Array:
        out = np.zeros((*mask.shape, WIDTH), np.float32)
        out[mask] = raw[tokens(batch)]
        return out

    cache = TeacherCache.create(folder / name, {"benchmark": name}, len(lengths), limits=Limits(resident_bytes=0))
    for part in torch.randperm(len(lengths)).split(100):
        mask = mask_of(part.numpy())
        cache.add(part, ModelOutput(torch.from_numpy(padded(part.numpy(), mask))), torch.from_numpy(mask))
    cache = _reopened(cache)
    batches = _batches(len(lengths))
    masks = [mask_of(batch) for batch in batches]
    given = [(torch.from_numpy(b), torch.from_numpy(m).long()) for b, m in zip(batches, masks, strict=True)]

    def read_padded() -> None:
        for batch, mask in zip(batches, masks, strict=True):
            padded(batch, mask)

    def read_unpadded() -> None:
        for batch in batches:
            raw[tokens(batch)]

    def read_cache() -> None:
        for index, mask in given:
            cache.lookup(index, mask)

    for batch, mask, (index, attention) in zip(batches, masks, given, strict=True):
        assert np.array_equal(cache.lookup(index, attention).logits.numpy(), padded(batch, mask))
    work: dict[str, Callable[[], object]] = {"raw": read_padded, "unpadded": read_unpadded, "cache": read_cache}
    seconds = interleave(work, ROUNDS)
    return [
        Measure(
            f"{name}, 8 to 40 tokens: raw map / cache", ratios(seconds["raw"], seconds["cache"]), "ratio", ">= 0.9",
            f"{len(cache.manifest.shards)} mapped shards; both make the padded batch",
        ),
        Measure(
            f"{name}, 8 to 40 tokens: raw map unpadded / cache", ratios(seconds["unpadded"], seconds["cache"]),
            "ratio", None, "the raw reader does not pad, the cache does",
        ),
        _size(name, cache, flat.nbytes),
    ]  # fmt: skip


def _speed(name: str, work: dict[str, Callable[[], object]]) -> Measure:
    seconds = interleave(work, ROUNDS)
    return Measure(
        f"{name}: raw map / cache", ratios(seconds["raw"], seconds["cache"]), "ratio", ">= 0.9", "held in memory"
    )


def _size(name: str, cache: TeacherCache, payload: int) -> Measure:
    stored = sum(path.stat().st_size for path in cache.folder.iterdir())
    number = cache.manifest.num_examples
    note = f"{stored / number:.1f} of {payload / number:.1f} bytes an example: index, lengths, headers and manifest"
    return Measure(f"{name}: bytes on disk / bytes of numbers", [stored / payload], "ratio", "<= 1.05", note)


def _batches(number: int) -> list[NDArray[np.int64]]:
    return [batch.numpy() for batch in torch.randperm(number).split(BATCH)]


def _raw(path: Path, rows: Array) -> np.memmap[tuple[int, ...], np.dtype[np.float32]]:
    rows.tofile(path)
    return np.memmap(path, np.float32, "r", shape=rows.shape)


def _reopened(cache: TeacherCache) -> TeacherCache:
    cache.flush()
    return TeacherCache.open(cache.folder, limits=cache.limits)
