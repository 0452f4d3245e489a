"""Where each example's outputs are stored, and copying them into a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.outputs import Spec, decode
from kd_lightning.teachers.cache.shards import Segment, cooked, numpy_dtype
from kd_lightning.types import SparseLogits

NOWHERE = -1

Mask = NDArray[np.bool_]


class Places:
    """For every example, the segment with its outputs and their offset in it.

    Args:
        num_examples: N.
        variable: Whether any output is per token, or per pair of tokens.
    """

    def __init__(self, num_examples: int, variable: bool) -> None:
        self.segment = np.full(num_examples, NOWHERE, np.int32)
        self.row = np.zeros(num_examples, np.int64)
        self.length = np.zeros(num_examples if variable else 0, np.int32)
        self.token = np.zeros(num_examples if variable else 0, np.int64)  # tokens before it in its segment
        self.pair = np.zeros(num_examples if variable else 0, np.int64)  # pairs of tokens before it in its segment
        self.rows = np.zeros(num_examples if variable else 0, np.int32)
        self.kept = np.zeros(num_examples if variable else 0, np.int64)  # kept rows before it in its segment

    def register(self, number: int, segment: Segment) -> None:
        """Register a segment, from which its examples are read from now on."""
        self.segment[segment.index] = number
        self.row[segment.index] = np.arange(len(segment.index))
        if segment.lengths is not None:
            lengths = segment.lengths.astype(np.int64)
            self.length[segment.index] = lengths
            self.token[segment.index] = lengths.cumsum() - lengths
            self.pair[segment.index] = (lengths**2).cumsum() - lengths**2
        if segment.rows is not None:
            rows = segment.rows.astype(np.int64)
            self.rows[segment.index] = rows
            self.kept[segment.index] = rows.cumsum() - rows

    def known(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of the examples are stored."""
        self.check_range(index)
        known: NDArray[np.bool_] = self.segment[index] != NOWHERE
        return known

    def fresh(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of the examples that are not stored, each example once."""
        first = np.sort(np.unique(index, return_index=True)[1])
        return first[~self.known(index[first])]

    def check_range(self, index: NDArray[np.int64]) -> None:
        """Refuse an index outside 0..N-1.

        Raises:
            CacheError: Names the first of them.
        """
        outside = (index < 0) | (index >= len(self.segment))
        if outside.any():
            raise CacheError(
                f"the batch has an example with index {index[outside][0]}; the cache is for {len(self.segment)} "
                "examples, numbered from 0: it belongs to other data"
            )

    def check(self, index: NDArray[np.int64]) -> None:
        """Refuse examples that are not stored.

        Raises:
            CacheError: Names the first of them.
        """
        unknown = ~self.known(index)
        if unknown.any():
            raise CacheError(
                f"the cache lacks {unknown.sum()} of these {len(index)} examples, the first of them with index "
                f"{index[unknown][0]}: complete it (kd-cache build, or teacher.cache=auto)"
            )

    def check_lengths(self, index: NDArray[np.int64], mask: Mask, rows: bool = False) -> None:
        """Refuse a batch whose examples have other lengths than when they were stored.

        Args:
            index: Which examples, `(B,)`.
            mask: Their real tokens, or their kept rows, `(B, L)`.
            rows: Whether it is the latter.

        Raises:
            CacheError: Names the first of them.
        """
        tokens, stored = mask.sum(1), (self.rows if rows else self.length)[index]
        if (tokens != stored).any():
            i = int((tokens != stored).argmax())
            raise CacheError(
                f"the example with index {index[i]} has {tokens[i]} {'kept ' * rows}tokens in this batch and "
                f"{stored[i]} in the cache: another tokenizer, data.max_length or attention mask"
            )


def read(
    spec: Spec, places: Places, segments: Mapping[int, Segment], index: NDArray[np.int64], mask: Tensor | None
) -> Tensor | SparseLogits:
    """Return one output of a batch from its segments, float32 on the CPU.

    Args:
        spec: Which output.
        places: Where the outputs are.
        segments: The segments by number.
        index: The examples, `(B,)`, all of them stored.
        mask: `(B, L)`, nonzero at real tokens; for an output per token, or per pair of tokens. For one per kept row
            nonzero at those.

    Raises:
        CacheError: There is no mask, or it does not match the stored lengths.
    """
    if spec.kind == "example":
        return decode(spec, _read_fixed(spec, places, segments, index))
    if mask is None:
        needed = "`keep`" if spec.kind == "row" else "an attention mask"
        raise CacheError(f"{spec.name} is stored for real tokens only: its batches need {needed}")
    real = mask.cpu().bool()
    places.check_lengths(index, real.numpy(), rows=spec.kind == "row")
    return decode(spec, _read_runs(spec, places, segments, index, real.numpy()), real)


def _read_fixed(
    spec: Spec, places: Places, segments: Mapping[int, Segment], index: NDArray[np.int64]
) -> dict[str, Tensor]:
    """Return the stored parts of a fixed-width output for a batch, one vectorised copy a shard."""
    where, row = places.segment[index], places.row[index]
    groups = [(number, np.flatnonzero(where == number)) for number in np.unique(where).tolist()]
    found = {}
    for name, (shape, dtype) in spec.parts.items():
        out = np.empty((len(index), *shape), numpy_dtype(dtype))
        for number, members in groups:
            out[members] = segments[number].parts[name][row[members]]
        found[name] = cooked(out, dtype)
    return found


def _read_runs(
    spec: Spec, places: Places, segments: Mapping[int, Segment], index: NDArray[np.int64], mask: Mask
) -> dict[str, Tensor]:
    """Return the stored parts of an output per token, or per pair of tokens, at the places of the mask.

    An example's units are contiguous in the file and mostly in the batch too, so each is a single copy from the mapped
    file; gathering token by token is slower.
    """
    batch, tokens = mask.shape
    heads = math.prod(spec.shape)
    begin = {"token": places.token, "row": places.kept, "pair": places.pair}[spec.kind][index]
    begin = heads * begin if spec.kind == "pair" else begin
    runs = list(zip(places.segment[index].tolist(), begin.tolist(), _kept(mask), strict=True))
    found = {}
    for name, (shape, dtype) in spec.parts.items():
        size = (heads, tokens, tokens) if spec.kind == "pair" else (tokens, *shape)
        out = np.zeros((batch, *size), numpy_dtype(dtype))
        for row, (number, start, (keep, n)) in zip(out, runs, strict=True):
            units = segments[number].parts[name]
            if spec.kind == "pair":
                block = units[start : start + heads * n * n].reshape(heads, n, n)
                row[:, keep if isinstance(keep, slice) else keep[:, None], keep] = block
            else:
                row[keep] = units[start : start + n]
        found[name] = cooked(out, dtype)
    return found


def _kept(mask: Mask) -> Iterator[tuple[slice | NDArray[np.int64], int]]:
    """Yield where each example's real tokens are, as a slice unless there are gaps, and how many."""
    tokens = mask.shape[1]
    number, first = mask.sum(1), mask.argmax(1)
    last = tokens - mask[:, ::-1].argmax(1)
    for i, (n, start, stop) in enumerate(zip(number.tolist(), first.tolist(), last.tolist(), strict=True)):
        yield (slice(start, start + n) if stop - start == n or n == 0 else np.flatnonzero(mask[i])), n
