"""Token data sets that return whole batches, and the examples of each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.data.text.augment import Views
from kd_lightning.data.text.tokens import TokenStore, encode_batch
from kd_lightning.types import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class FreshViews:
    """Views created and tokenised on the fly, different in every epoch.

    Attributes:
        views: Their numbering; epoch e has set e.
        tokenizers: By the prefix of their names in the batch.
        max_length: Longer ones are cut to this many tokens.
    """

    views: Views
    tokenizers: Mapping[str, PreTrainedTokenizerFast]
    max_length: int

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """Return views as a batch of `(B, L)` entries, without labels and index."""
        sentences = [self.views.make(int(number)) for number in numbers]
        return {
            prefix + name: entry
            for prefix, tokenizer in self.tokenizers.items()
            for name, entry in encode_batch(tokenizer, sentences, self.max_length).items()
        }


class TokenDataset(BatchDataset):
    """A run of encoded sentences.

    Args:
        stores: Encoded sentences by the prefix of their names in the batch: `""`, and `"teacher_"` for a second one.
        labels: Of all examples there are, `(N,)` int64; float32 for a regression.
        span: The examples of this run.
        turns: Runs of examples of equal length, one per epoch: epoch e has the run `e % len(turns)`.
        fresh: Views that are not stored. They have the positions from `len(self)` on, epoch after epoch, the label
            `IGNORE` and the index -1. Their sentences are the first examples of `span`.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        labels: NDArray[np.int64] | NDArray[np.float32],
        span: range,
        turns: Sequence[range] = (),
        fresh: FreshViews | None = None,
    ) -> None:
        self.stores = stores
        self.labels = labels
        self.span = span
        self.turns = turns
        self.fresh = fresh

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each example, over all tokenizers, `(len(self),)`."""
        total = sum(store.lengths for store in self.stores.values())
        return np.asarray(total)[self.span.start : self.span.stop]

    def _turn(self, epoch: int) -> Turn:
        """Return the positions of an epoch; a fresh view counts with the length of its sentence."""
        positions, lengths = np.arange(len(self)), self.lengths
        if self.turns:
            taken = np.ones(len(self), bool)
            for number, run in enumerate(self.turns):
                taken[run.start - self.span.start : run.stop - self.span.start] = number == epoch % len(self.turns)
            positions, lengths = positions[taken], lengths[taken]
        if self.fresh is not None:
            views = self.fresh.views
            numbers = np.arange(views.per_set)
            positions = np.concatenate([positions, len(self) + epoch * views.per_set + numbers])
            lengths = np.concatenate([lengths, lengths[numbers // views.count]])
        return positions, lengths

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        index = np.asarray(positions, np.int64) + self.span.start
        if self.fresh is not None and (index >= self.span.stop).any():
            return self._with_fresh(self.fresh, index)
        return self._tokens(index) | {"labels": torch.from_numpy(self.labels[index]), "index": torch.from_numpy(index)}

    def _tokens(self, index: NDArray[np.int64]) -> Batch:
        return {
            prefix + name: value for prefix, store in self.stores.items() for name, value in store.batch(index).items()
        }

    def _with_fresh(self, fresh: FreshViews, index: NDArray[np.int64]) -> Batch:
        stored = index < self.span.stop
        batch = fresh.batch(index[~stored] - self.span.stop)
        if stored.any():
            batch = self._joined(stored, self._tokens(index[stored]), batch)
        index = np.where(stored, index, -1)
        labels = np.where(stored, self.labels[index], IGNORE)
        return batch | {"labels": torch.from_numpy(labels), "index": torch.from_numpy(index)}

    def _joined(self, first: NDArray[np.bool_], one: Batch, other: Batch) -> Batch:
        """Return `(B, L)` entries with rows from `one` if `first` is true, otherwise from `other`."""
        padding = {f"{prefix}input_ids": store.pad_token_id for prefix, store in self.stores.items()}
        rows = torch.from_numpy(first)
        joined = {}
        for name in one:
            widths = one[name].shape[1], other[name].shape[1]
            joined[name] = torch.full((len(rows), max(widths)), padding.get(name, 0))
            joined[name][rows, : widths[0]] = one[name]
            joined[name][~rows, : widths[1]] = other[name]
        return joined
