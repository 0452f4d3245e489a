"""Outputs that a cache holds in memory for all examples, so that reading a batch is one gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.teachers.cache.outputs import Spec, decode
from kd_lightning.teachers.cache.shards import Segment, cooked, empty
from kd_lightning.types import SparseLogits


class Tables:
    """A table for each part of the outputs that are small enough, `(N, ...)`, filled as segments come in.

    Args:
        specs: The cache's outputs.
        examples: N.
        most_bytes: The largest output, over all examples, that is held.
        device: Where the tables are.
    """

    def __init__(self, specs: Sequence[Spec], examples: int, most_bytes: int, device: torch.device) -> None:
        self._device = device
        with torch.inference_mode(False):
            self._parts = {
                spec.name: {
                    name: empty((examples, *shape), dtype).to(device) for name, (shape, dtype) in spec.parts.items()
                }
                for spec in specs
                if spec.kind == "example" and spec.unit_bytes * examples <= most_bytes
            }
        self.hold_all = len(self._parts) == len(specs)

    def to(self, device: torch.device) -> None:
        """Move the tables."""
        self._device = device
        with torch.inference_mode(False):
            for parts in self._parts.values():
                parts.update({name: part.to(device) for name, part in parts.items()})

    def fill(self, segment: Segment) -> None:
        """Take over a segment's values."""
        rows = torch.from_numpy(segment.index).to(self._device)
        with torch.inference_mode(False):
            for parts in self._parts.values():
                for name, part in parts.items():
                    part[rows] = cooked(segment.parts[name], part.dtype).to(self._device)

    def final(self, spec: Spec) -> Tensor | None:
        """Return the table of an output whose values need no decoding; None where there is none."""
        is_final = spec.name in self._parts and spec.top_k is None and spec.dtype == "float32"
        return self._parts[spec.name][next(iter(spec.parts))] if is_final else None

    def read(self, spec: Spec, rows: Tensor) -> Tensor | SparseLogits | None:
        """Return an output of some examples, decoded; None where it is not held."""
        if (parts := self._parts.get(spec.name)) is None:
            return None
        return decode(spec, {name: part.index_select(0, rows) for name, part in parts.items()})
