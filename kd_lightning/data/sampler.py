"""Samples batches of similar lengths: deterministic, distributed, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from kd_lightning.runtime.errors import ConfigError

Positions = NDArray[np.int64]
Turn = tuple[Positions, NDArray[np.int64]]
"""An epoch's examples: positions, and the number of tokens of each."""

POOL_BATCHES = 50
"""Global batches that are sorted by length together: a compromise of padding and randomness."""


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; `(0, 1)` outside distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def endless(size: int, count: int, epoch: int, seed: Sequence[int]) -> Iterator[tuple[int, Positions]]:
    """Yield an epoch's share of endless passes over `size` examples, each pass in its own order.

    Args:
        size: Examples in a pass.
        count: Examples in an epoch; those of the next one follow.
        epoch: Which epoch.
        seed: Of the orders.

    Yields:
        The number of a pass, and the places in it; `count` over all.
    """
    start, stop = epoch * count, (epoch + 1) * count
    for number in range(start // size, -(-stop // size)):
        order = np.random.default_rng([*seed, number]).permutation(size)
        yield number, order[max(start - number * size, 0) : stop - number * size]


@dataclass(frozen=True)
class Share:
    """The number of unlabelled examples of an epoch, per labelled one.

    Attributes:
        labelled: How many labelled examples there are; they have the first positions.
        ratio: How many others come with each.
        seed: Of their order; no example repeats before all have been used.
    """

    labelled: int
    ratio: float
    seed: int

    def of(self, turn: Turn, epoch: int) -> Turn:
        """Return the selected positions of an epoch."""
        positions, lengths = turn
        first, pool = (np.flatnonzero(chosen) for chosen in (positions < self.labelled, positions >= self.labelled))
        if not len(pool):
            return turn
        count = max(round(self.ratio * len(first)), 1)
        places = [pool[places] for _, places in endless(len(pool), count, epoch, [self.seed, 1])]
        taken = np.concatenate([first, *places])
        return positions[taken], lengths[taken]


class BucketBatchSampler(DistributedSampler[Any]):
    """Yields arrays of positions, one per batch, for `DataLoader(sampler=..., batch_size=None)`.

    A step has `world_size * batch_size` examples of similar lengths, divided among the ranks, so that the ranks
    together train like one process with the whole batch. Every rank has the same number of steps:

    * with `shuffle`, the order depends on `(seed, epoch)` alone. If the examples cannot be divided evenly, up to
      `world_size - 1` examples of the epoch appear twice; none is missing. Where the last batch of one process
      would be a single example, which BatchNorm cannot learn from, it gets a second one from the batch before (of 3 or
      more). That of several processes does not: they train on the batches of one with the same global batch.
    * without, examples come sorted by length and each exactly once over all ranks; batches of one step may then differ
      by one example in size.

    It is a `DistributedSampler`, which Lightning does not replace by its own.

    Args:
        lengths: Tokens in each example, `(N,)`; or, where not every epoch takes the same examples, a function from the
            epoch to its `Turn`, of the same size for all epochs.
        batch_size: Examples in a batch of one rank.
        shuffle: Whether for training.
        seed: Of the order.
        rank: This process's; by default as `torch.distributed` says.
        world_size: The number of processes; by default as `torch.distributed` says.

    Raises:
        ConfigError: `batch_size` is not positive, or there are fewer examples than processes.
    """

    def __init__(
        self,
        lengths: NDArray[Any] | Callable[[int], Turn],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        here, world = rank_and_world()
        rank = here if rank is None else rank
        world = world if world_size is None else world_size
        if batch_size < 1:
            raise ConfigError(f"data.batch_size={batch_size}: expected 1 or more")
        self.turn = lengths if callable(lengths) else lambda _: (np.arange(len(lengths)), np.asarray(lengths))
        self.size = len(self.turn(0)[0])
        if self.size < world:
            raise ConfigError(f"{self.size} examples cannot be divided among {world} processes; lower trainer.devices")
        super().__init__(range(self.size), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self._resumed: tuple[int, int] | None = None

    @property
    def global_batch_size(self) -> int:
        """Examples in one step of all ranks."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        """Return the batches in a whole epoch, the same on every rank; resuming does not change it."""
        steps = -(-self.size // self.global_batch_size)
        if self.shuffle:
            return steps
        return min(steps, self.size // self.num_replicas)  # otherwise a rank could have no example and block the others

    @property
    def smallest(self) -> int:
        """Examples in the smallest training batch of a rank."""
        each = -(-self.size // self.num_replicas)
        rest = each % self.batch_size or self.batch_size
        moved = rest == 1 and each > 1 and self.batch_size > 2 and self.num_replicas == 1
        return 2 if moved else min(rest, each)

    def resume(self, epoch: int, batches: int) -> None:
        """Start at `epoch` and skip its first `batches` batches; other epochs are complete."""
        self.set_epoch(epoch)
        self._resumed = (epoch, batches)

    def __iter__(self) -> Iterator[Positions]:
        # The order is fixed here and not at the first `next`: Lightning creates the first iterator of a fit before it
        # sets the epoch, and worker processes have already fetched some batches by then.
        steps = self._training_steps() if self.shuffle else self._evaluation_steps()
        skipped = self._resumed[1] if self._resumed and self._resumed[0] == self.epoch else 0
        return iter([step[self.rank :: self.num_replicas] for step in steps[skipped:]])

    def _training_steps(self) -> list[Positions]:
        generator = np.random.default_rng([self.seed, self.epoch])
        positions, lengths = self.turn(self.epoch)
        order = generator.permutation(len(positions))
        order = np.resize(order, len(order) + -len(order) % self.num_replicas)
        size = self.global_batch_size
        steps: list[Positions] = []
        for start in range(0, len(order), size * POOL_BATCHES):
            pool = order[start : start + size * POOL_BATCHES]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            steps += [positions[pool[cut : cut + size]] for cut in range(0, len(pool), size)]
        if len(steps) > 1 and len(steps[-1]) == 1 and self.batch_size > 2:
            steps[-2], moved = np.split(steps[-2], [-1])
            steps[-1] = np.concatenate([moved, steps[-1]])
        return [steps[i] for i in generator.permutation(len(steps))]

    def _evaluation_steps(self) -> list[Positions]:
        positions, lengths = self.turn(self.epoch)
        return np.array_split(positions[np.argsort(lengths, kind="stable")], len(self))


def position(trainer: L.Trainer) -> tuple[int, int]:
    """Return the epoch that the next training batch belongs to and how many of its batches are done."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epochs.ready == epochs.processed:  # between epochs
        return epochs.processed, 0
    if batches.processed >= trainer.num_training_batches:
        return epochs.processed + 1, 0
    return epochs.processed, batches.processed
