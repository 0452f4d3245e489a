"""Runs of examples, loaders that fetch them a whole batch at a time, and batches of several kinds."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
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

    @property
    def whole(self) -> Turn:
        """The positions that an evaluation goes through, and their lengths."""
        return np.arange(len(self)), self.lengths

    def places(self, index: Iterable[int]) -> list[int]:
        """Return the positions of the examples of these numbers; others have none here."""
        return [number - self.span.start for number in index if number in self.span]

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


def spread(loader: Any, count: int) -> Iterator[Batch]:
    """Fetch so many of a split's batches, from all over it, and no others; all where it has fewer.

    Args:
        loader: What `in_batches` returns.
        count: How many.
    """
    steps = list(loader.sampler)
    for place in sorted({(2 * number + 1) * len(steps) // (2 * count) for number in range(count)}):
        yield loader.dataset[steps[place]]


def merged(parts: Sequence[tuple[torch.Tensor, Batch, Mapping[str, int]]], size: int) -> Batch:
    """Merge batches into one, padded on the right.

    A batch whose teacher uses the student's tokens has no `teacher_*`: it gets the student's there.

    Args:
        parts: Batches, each with a mask `(size,)` of the rows that it fills, and what pads its entries, if not 0.
        size: Rows of all together.
    """
    joined: Batch = {}
    for name in dict.fromkeys(name for _, batch, _ in parts for name in batch):
        values = [batch.get(name, batch.get(name.removeprefix("teacher_"))) for _, batch, _ in parts]
        given = [value for value in values if value is not None]
        shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in given), strict=True)]
        joined[name] = given[0].new_zeros(size, *shape)
        for (rows, _, padding), value in zip(parts, values, strict=True):
            if value is not None:
                missing = [wanted - length for wanted, length in zip(shape, value.shape[1:], strict=True)]
                margins = [side for more in reversed(missing) for side in (0, more)]
                joined[name][rows] = F.pad(value, margins, value=padding.get(name, 0))
    return joined
