"""Windows of texts in flat arrays of tokens, as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.data.text.tokens import padded
from kd_lightning.types import Batch

Entry = tuple[NDArray[Any], Any]
"""A value of each token, `(T,)`, and what pads it."""


class FlatDataset(BatchDataset):
    """A run of windows, each a run of flat arrays.

    Batches have `index`, the `columns`, and of each prefix the `entries` and `attention_mask`, `(B, L)`.

    Args:
        offsets: Where each window begins and the last one ends, `(N + 1,)`, by the prefix of the entries' names.
        entries: Of all windows, by prefix and name.
        columns: A value of each window, `(N,)`, by name.
        span: Which of the windows these are.
    """

    def __init__(
        self,
        offsets: Mapping[str, NDArray[np.int64]],
        entries: Mapping[str, Mapping[str, Entry]],
        columns: Mapping[str, NDArray[np.int64]],
        span: range,
    ) -> None:
        self.offsets, self.entries, self.columns, self.span = offsets, entries, columns, span

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each window, over all tokenizers, `(len(self),)`."""
        total = sum(np.diff(one) for one in self.offsets.values())
        return np.asarray(total)[self.span.start : self.span.stop]

    def _turn(self, epoch: int) -> Turn:
        return np.arange(len(self)), self.lengths

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        index = np.asarray(positions, np.int64) + self.span.start
        batch = {"index": index, **{name: column[index] for name, column in self.columns.items()}}
        for prefix, entries in self.entries.items():
            place, mask = padded(self.offsets[prefix], index)
            batch |= {prefix + name: np.where(mask, flat[place], fill) for name, (flat, fill) in entries.items()}
            batch[f"{prefix}attention_mask"] = mask.astype(np.int64)
        return {name: torch.from_numpy(entry) for name, entry in batch.items()}
