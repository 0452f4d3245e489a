"""`StoredOutputs`: teacher outputs by example, read from shards and from tables in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.teachers.cache.manifest import Manifest
from kd_lightning.teachers.cache.outputs import Spec
from kd_lightning.teachers.cache.places import NOWHERE, Places, read
from kd_lightning.teachers.cache.shards import Limits, Segment, open_shard
from kd_lightning.teachers.cache.tables import Tables
from kd_lightning.types import ModelOutput, SparseLogits


class StoredOutputs:
    """The outputs of a cache that are stored.

    Args:
        folder: With the shards.
        manifest: As read from the folder.
        limits: What is held in memory.
    """

    def __init__(self, folder: Path, manifest: Manifest, limits: Limits) -> None:
        self.folder, self.manifest, self.limits = folder, manifest, limits
        self._device = torch.device("cpu")
        self._segments: dict[int, Segment] = {}
        self._mapped: set[str] = set()  # names of the shards among them
        self._next = 0
        self._known = 0
        self._in_memory = False  # all outputs for all examples
        self._places = Places(manifest.num_examples, variable=False)
        self._tables = Tables((), 0, 0, self._device)
        self._list_outputs()
        self._prepare()

    @property
    def complete(self) -> bool:
        """Whether the outputs of all N examples are stored."""
        return self._known == self.manifest.num_examples

    @property
    def stored(self) -> int:
        """How many examples' outputs are stored."""
        return self._known

    def known(self, index: Tensor) -> Tensor:
        """Return whether each example is stored, `(B,)` bool on the CPU."""
        return torch.from_numpy(self._places.known(index.cpu().numpy()))

    def missing(self) -> Tensor:
        """Return the examples that are not stored yet, ascending, `(M,)` int64."""
        return torch.from_numpy(np.flatnonzero(self._places.segment == NOWHERE))

    def to(self, device: torch.device | str) -> Self:
        """Return outputs on this device from now on; tables held in memory move there."""
        self._device = torch.device(device)
        self._tables.to(self._device)
        self._list_outputs()
        return self

    def lookup(
        self,
        index: Tensor,
        mask: Tensor | None = None,
        features: Sequence[str] | None = None,
        keep: Tensor | None = None,
    ) -> ModelOutput:
        """Return the stored outputs for a batch, in its order, as float32 on the device of `to`.

        Args:
            index: The examples, `(B,)` int64, in any order, with repetitions.
            mask: `(B, L)`, nonzero at real tokens, if an output is per token. Padding may be on either side and of
                another length than in the teacher's batch; outputs are zero there.
            features: The stored features to return; None: all.
            keep: `(B, L)`, the kept rows, if logits are per token; other rows are zero.

        Raises:
            CacheError: An example is missing, or has another number of tokens than when it was stored.
        """
        if torch.is_inference_mode_enabled():  # autograd does not accept tensors created in inference mode
            with torch.inference_mode(False):
                return self.lookup(index, mask, features, keep)
        here = None
        if not self._in_memory:
            here = index.cpu().numpy()
            self._places.check(here)
        if index.device != self._device:
            index = index.to(self._device)
        values: dict[str, Any] = {}
        try:
            for spec, exact in self._outputs:
                if features is not None and spec.name != "logits" and spec.name not in features:
                    continue
                places = keep if spec.kind == "row" else mask
                output = self._read(spec, index, here, places) if exact is None else exact.index_select(0, index)
                values[spec.name] = output
        except (IndexError, RuntimeError):
            self._places.check(index.cpu().numpy())
            raise
        logits = values.pop("logits")
        if isinstance(logits, SparseLogits):
            return ModelOutput(logits.values[..., :0], values, logits)
        return ModelOutput(logits, values)

    def _read(
        self, spec: Spec, rows: Tensor, here: NDArray[np.int64] | None, mask: Tensor | None
    ) -> Tensor | SparseLogits:
        """Return one output of a batch from its table or the mapped files; `here` is `rows` as an array."""
        if (held := self._tables.read(spec, rows)) is not None:
            return held
        assert here is not None
        return read(spec, self._places, self._segments, here, mask).to(self._device)

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Allocate the tables, once the specs are known, and open the shards."""
        specs, number = self.manifest.specs, self.manifest.num_examples
        if not specs:
            return
        self._places = Places(number, variable=any(spec.kind != "example" for spec in specs))
        self._tables = Tables(specs, number, self.limits.resident_bytes, self._device)
        self._list_outputs()
        self._open_shards()

    def _list_outputs(self) -> None:
        """List the outputs, each with its table if that holds final values."""
        self._outputs = [(spec, self._tables.final(spec)) for spec in self.manifest.specs]

    def _open_shards(self) -> None:
        for record in self.manifest.shards:
            if record.file not in self._mapped:
                self._take_in(open_shard(self.folder, record))
                self._mapped.add(record.file)

    def _take_in(self, segment: Segment) -> int:
        """Register a segment, from which its examples are read from now on; return its number."""
        number, self._next = self._next, self._next + 1
        self._segments[number] = segment
        self._known += int((self._places.segment[segment.index] == NOWHERE).sum())
        self._in_memory = self.complete and self._tables.hold_all
        self._places.register(number, segment)
        self._tables.fill(segment)
        return number
