"""Stored outputs of a language model: what storing K of them adds to its pass, their size, and reading them back.

* the pass of a network of SmolLM2's size (30 layers x 576, V = 49,152, random weights, bfloat16 where this machine
  multiplies it natively) over batches of 8 blocks of 128 tokens into a cache of its 32 likeliest tokens and the tail,
  against its forward pass alone, whose logits are dropped
* bytes on disk for a token that is predicted
* batches of 16 blocks read in random order, against the same bytes in raw memory maps of numpy (ids, log
  probabilities, tail), which make the same arrays; of a cache that is mapped from disk
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Measure, interleave, ratios
from benchmarks.lm_task import BLOCK, TOP_K, smollm2_shaped
from kd_lightning.config.resolvers import fast_inference
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.shards import Limits
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.types import Batch, ModelOutput, SparseLogits

VOCABULARY, PASSES, BATCH = 49_152, 6, 8
STORED, READ = 4_000, 16
ROUNDS = 5
STORAGE = Storage("float16", TOP_K)


def run() -> list[Measure]:
    """Return all three."""
    with tempfile.TemporaryDirectory(prefix="lm_cache_") as folder:
        return [*_pass(Path(folder)), *_read(Path(folder))]


def _pass(folder: Path) -> list[Measure]:
    precision = fast_inference()
    teacher = FrozenTeacher(smollm2_shaped(VOCABULARY), precision)
    generator = torch.Generator().manual_seed(0)
    batches: list[Batch] = []
    for start in range(0, PASSES * BATCH, BATCH):
        ids = torch.randint(VOCABULARY, (BATCH, BLOCK), generator=generator)
        batches.append({
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(start, start + BATCH),
        })  # fmt: skip
    number = iter(range(1000))

    def store() -> None:
        cache = TeacherCache.create(folder / f"pass_{next(number)}", {"benchmark": "lm"}, PASSES * BATCH, STORAGE)
        fill(cache, teacher, batches)

    def bare() -> None:
        for batch in [batches[0], *batches]:  # `fill` runs the first batch twice
            teacher(batch)

    seconds = interleave({"store": store, "bare": bare}, ROUNDS)
    shares = ratios(seconds["store"], seconds["bare"])
    return [
        Measure(
            f"the teacher's pass that stores the {TOP_K} likeliest / without storing",
            shares,
            "ratio",
            "<= 1.10",
            precision,
        )
    ]


def _read(folder: Path) -> list[Measure]:
    generator = np.random.default_rng(0)
    shape = STORED, BLOCK
    values = np.sort(generator.standard_normal((*shape, TOP_K)).astype(np.float16) - 4)[..., ::-1].copy()
    first = generator.integers(VOCABULARY, size=(*shape, 1))
    ids = (first + 1531 * np.arange(TOP_K)) % VOCABULARY
    rest = generator.standard_normal(shape).astype(np.float32) - 2
    limits = Limits(resident_bytes=0)
    cache = TeacherCache.create(folder / "stored", {"benchmark": "lm"}, STORED, STORAGE, limits=limits)
    mask = torch.ones(100, BLOCK, dtype=torch.bool)
    for part in torch.randperm(STORED).split(100):
        at = part.numpy()
        sparse = SparseLogits(*(torch.from_numpy(x[at]) for x in (values.astype(np.float32), ids, rest)), VOCABULARY)
        cache.add(part, ModelOutput(torch.empty(len(part), BLOCK, 0), sparse=sparse), mask)
    cache.flush()
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    cache = TeacherCache.open(cache.folder, limits=limits)
    raw = []
    for name, array in (("values", values), ("ids", ids.astype(np.uint16)), ("rest", rest)):
        array.tofile(folder / name)
        raw.append(np.memmap(folder / name, array.dtype, "r", shape=array.shape))
    batches = torch.randperm(STORED).split(READ)
    attention = torch.ones(READ, BLOCK, dtype=torch.long)

    def of_raw(index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = index.numpy()
        made = zip(raw, (np.float32, np.int64, np.float32), strict=True)
        return tuple(torch.from_numpy(np.asarray(x[at]).astype(dtype)) for x, dtype in made)

    found = cache.lookup(batches[0], attention).sparse
    assert found is not None
    assert torch.equal(found.ids, of_raw(batches[0])[1])
    seconds = interleave({
        "raw": lambda: [of_raw(index) for index in batches],
        "cache": lambda: [cache.lookup(index, attention) for index in batches],
    }, ROUNDS)  # fmt: skip
    return [
        Measure(f"bytes stored of a token, K = {TOP_K}", [size / (STORED * BLOCK)], "bytes", "<= 140"),
        Measure(
            "reading in random order: raw memory map / cache",
            ratios(seconds["raw"], seconds["cache"]),
            "ratio",
            ">= 0.9",
        ),
        Measure("reading in random order", [1e6 * one / (STORED * BLOCK) for one in seconds["cache"]], "µs/token"),
    ]
