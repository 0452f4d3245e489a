"""Means over all batches of a training step: of all processes and accumulated gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kd_lightning.training.loss_balancing import mean_over_ranks
from kd_lightning.types import Batch


class StepCounts:
    """The counts (examples, tokens, ...) of a training step's means, averaged over its batches.

    DDP averages gradients over the processes, and Lightning over the batches of an accumulation. The average of a loss
    that is weighted by `count(batch) / mean(batch)` is its mean over the whole step. One small tensor is averaged over
    the processes in each step; a step that is one batch of one process costs nothing.

    Args:
        trainer: Whose steps they are.
        count: Says of a batch how many things each mean is over.
    """

    def __init__(self, trainer: Any, count: Callable[[Batch], Tensor]) -> None:
        self.trainer, self.count = trainer, count
        self._coming: deque[Tensor] | None = None
        self._mean = torch.empty(0)

    def around(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader's batches, fetched by step, so that the counts of a step are known first."""
        self._coming = deque()
        return _Steps(loader, self.trainer, self.count, self._coming)

    def mean(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the step's average; None where the batch is the whole step.

        Of an accumulation over batches that did not come through `around`, each is taken for a step of its own.
        """
        batches, processes = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if batches == processes == 1:
            return None
        if self._coming is None or batch_idx % batches == 0:
            own = self._coming.popleft() if self._coming else self.count(batch)
            own = own.to(next(iter(batch.values())).device)
            self._mean = mean_over_ranks(own) if processes > 1 else own
        return self._mean


class _Steps:
    """The batches of a loader, and what each step's means are over.

    Where an epoch ends within a step, Lightning divides its gradients by the full number of batches all the same. So
    does this, and the loss comes out as the mean over the batches that there are.
    """

    def __init__(
        self, loader: Iterable[Batch], trainer: Any, count: Callable[[Batch], Tensor], coming: deque[Tensor]
    ) -> None:
        self.loader, self.trainer, self.count, self.coming = loader, trainer, count, coming
        self.sampler = getattr(loader, "sampler", None)  # Lightning tells it the epoch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return self._by_step(iter(self.loader))  # made now: the order of an epoch is settled with the iterator

    def _by_step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        self.coming.clear()
        size = self.trainer.accumulate_grad_batches
        while step := list(islice(batches, size)):
            self.coming.append(torch.stack([self.count(batch) for batch in step]).sum(0) / size)
            yield from step
