"""One shard: a safetensors file that is written once, checked by its sha256 and memory-mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_lightning.runtime.errors import CacheError
from kd_lightning.runtime.files import half_saved, replacing
from kd_lightning.teachers.cache.manifest import SHARD_NAME, ShardRecord, cannot_write, remedy
from kd_lightning.teachers.cache.outputs import Spec

_TEMPORARY = (".shard-*.safetensors.*", ".manifest.json.*", ".refresh.json.*", ".contents.bin.*")

Raw = NDArray[Any]
"""Numbers as in the file; bfloat16, which numpy does not support, as int16."""


@dataclass(frozen=True)
class Limits:
    """When a shard is written, and what is held in memory.

    Attributes:
        shard_bytes: A shard is written when this many bytes are pending.
        shard_seconds: It is also written this long after the last one, so that a kill loses little.
        resident_bytes: A fixed-width output whose N rows take at most this many bytes is held in memory as one table.
    """

    shard_bytes: int = 64 * 2**20
    shard_seconds: float = 20.0
    resident_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Segment:
    """Outputs for some examples: a mapped shard, or what was added since the last one was written.

    Attributes:
        index: The examples, `(n,)` int64.
        lengths: The real tokens of each, `(n,)` int32; None if no output is per token.
        rows: The kept rows of each, `(n,)` int32; None where no output is of those.
        parts: The units of all of them by the name of the tensor.
    """

    index: NDArray[np.int64]
    lengths: NDArray[np.int32] | None
    rows: NDArray[np.int32] | None
    parts: Mapping[str, Raw]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Segment:
        """Return views on a shard's tensors."""
        arrays = {name: raw(tensor) for name, tensor in tensors.items()}
        if "members" in arrays:
            arrays["index"] = np.flatnonzero(np.unpackbits(arrays.pop("members")))
        return cls(arrays.pop("index"), arrays.pop("length", None), arrays.pop("rows", None), arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs."""
        return sum(part.nbytes for part in self.parts.values())

    def units(self, spec: Spec) -> NDArray[np.int64]:
        """Return how many units of an output each example has, `(n,)`."""
        none = np.zeros(len(self.index), np.int64)
        lengths, rows = (none if x is None else x.astype(np.int64) for x in (self.lengths, self.rows))
        return np.broadcast_to(np.asarray(spec.units(lengths, lengths**2, rows), np.int64), lengths.shape)


def raw(tensor: Tensor) -> Raw:
    """Return a tensor's numbers as an array on the same memory."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def cooked(array: Raw, dtype: torch.dtype) -> Tensor:
    """Return an array of `raw` as the tensor it was, on the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate a table with numpy, which uses huge pages: random rows are read faster."""
    return cooked(np.empty(shape, numpy_dtype(dtype)), dtype)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the dtype of `raw`."""
    return raw(torch.empty(0, dtype=dtype)).dtype


def write_shard(folder: Path, tensors: dict[str, Tensor], fingerprint: str) -> ShardRecord:
    """Write a shard under the next free number, in one step.

    Raises:
        CacheError: The disk is full or cannot be written; no partial file is left.
    """
    taken = [int(match[1]) for path in folder.glob("shard-*") if (match := SHARD_NAME.fullmatch(path.name))]
    path = folder / f"shard-{max(taken, default=-1) + 1:05d}.safetensors"
    try:
        with replacing(path) as temporary:
            save_file(_packed(tensors), temporary, metadata={"fingerprint": fingerprint})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    return ShardRecord(path.name, len(tensors["index"]), size, sha256)


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the ascending `index` by a bit mask up to the last example, `members`, if that is shorter."""
    index = tensors["index"].numpy()
    if index[-1] // 8 + 1 >= index.nbytes:
        return tensors
    bits = np.zeros(int(index[-1]) + 1, np.bool_)
    bits[index] = True
    rest = {name: tensor for name, tensor in tensors.items() if name != "index"}
    return {"members": torch.from_numpy(np.packbits(bits)), **rest}


def join(specs: Sequence[Spec], segments: Sequence[tuple[Segment, NDArray[np.bool_]]]) -> dict[str, Tensor]:
    """Return the tensors of one shard: the selected examples of each segment, in ascending order."""
    index = np.concatenate([segment.index for segment, _ in segments])
    rows = np.flatnonzero(np.concatenate([keep for _, keep in segments]))
    rows = rows[index[rows].argsort()]
    return gather(specs, [segment for segment, _ in segments], rows, index[rows])


def gather(
    specs: Sequence[Spec], segments: Sequence[Segment], rows: NDArray[np.int64], index: NDArray[np.int64]
) -> dict[str, Tensor]:
    """Return the tensors of one shard.

    Args:
        specs: The stored outputs.
        segments: Where they are.
        rows: Which places of all segments together it takes, one more than once or not at all.
        index: Which example each of them is then, ascending.
    """
    found = {"index": torch.from_numpy(index)}
    if any(spec.kind != "example" for spec in specs):
        lengths = np.concatenate([segment.lengths for segment in segments if segment.lengths is not None])
        found["length"] = torch.from_numpy(lengths[rows])
    if any(spec.kind == "row" for spec in specs):
        kept = np.concatenate([segment.rows for segment in segments if segment.rows is not None])
        found["rows"] = torch.from_numpy(kept[rows])
    for spec in specs:
        units = np.concatenate([segment.units(spec) for segment in segments])
        begin, wanted = (units.cumsum() - units)[rows], units[rows]
        places = np.repeat(begin - (wanted.cumsum() - wanted), wanted) + np.arange(wanted.sum())
        for name, (_, dtype) in spec.parts.items():
            found[name] = cooked(np.concatenate([segment.parts[name] for segment in segments])[places], dtype)
    return found


def open_shard(folder: Path, record: ShardRecord) -> Segment:
    """Map a shard, reading only its header.

    Raises:
        CacheError: The file is missing or has another size.
    """
    path = folder / record.file
    if (wrong := _size_problem(path, record)) is not None:
        raise CacheError(f"{wrong}; {remedy(folder)}")
    try:
        with safe_open(path, framework="pt") as file:
            return Segment.of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:  # just removed, or never a shard
        raise CacheError(f"{path} cannot be read ({error}); {remedy(folder)}") from error


def shard_problem(folder: Path, record: ShardRecord) -> str | None:
    """Return what is wrong with a shard's file, None if it is bit by bit what was written."""
    path = folder / record.file
    if (wrong := _size_problem(path, record)) is not None:
        return wrong
    try:
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if whole else f"{path} is damaged: its sha256 is not that of what was written"


def _size_problem(path: Path, record: ShardRecord) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path} is missing ({error.strerror})"
    return None if size == record.bytes else f"{path} is damaged: it has {size} bytes of {record.bytes}"


def leftovers(folder: Path, used: set[str], fingerprint: str) -> list[Path]:
    """Return files of killed processes: partial ones, and shards of this cache that no manifest names.

    A file that merely has a shard's name, or belongs to another cache, is left alone.
    """
    found = [*half_saved(folder), *(path for pattern in _TEMPORARY for path in folder.glob(pattern))]
    for path in folder.glob("shard-*"):
        if SHARD_NAME.fullmatch(path.name) and path.name not in used and _fingerprint(path) == fingerprint:
            found.append(path)
    return sorted(found)


def _fingerprint(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint")
    except (SafetensorError, OSError):
        return None  # not a shard at all
