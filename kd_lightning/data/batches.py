"""Runs of examples, and loaders that fetch them a whole batch at a time."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from kd_lightning.data.sampler import BucketBatchSampler, Share, Turn
from kd_lightning.types import Batch


class BatchDataset(Dataset[Batch], ABC):
    """A run of examples, fetched a whole batch at a time.

    Attributes:
        span: Which of all examples these are.
        share: How many of the unlabelled examples an epoch uses; None: all.
        left_out: Positions that no epoch uses, `(len(self),)` bool; None: there are none.
    """

    span: range
    share: Share | None = None
    left_out: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.span)

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """The lengths by which batches are formed, `(len(self),)`."""

    def turn(self, epoch: int) -> Turn:
        """Return the positions that an epoch uses, and their lengths."""
        turn = self._turn(epoch)
        if self.left_out is not None:
            kept = ~self.left_out[turn[0]]
            turn = turn[0][kept], turn[1][kept]
        return turn if self.share is None else self.share.of(turn, epoch)

    @abstractmethod
    def _turn(self, epoch: int) -> Turn:
        """Return the positions from which an epoch takes its share, and their lengths."""


Dataset_ = TypeVar("Dataset_", bound=BatchDataset)


def in_batches(data: BatchDataset, sampler: BucketBatchSampler, num_workers: int, seed: int) -> DataLoader[Batch]:
    """Return a loader of the batches that a sampler forms."""
    if num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise each forked worker prints a warning
    return DataLoader(
        data,
        sampler=sampler,
        batch_size=None,  # the sampler's items are whole batches
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # otherwise each iterator draws from the global one
    )
