"""Running a teacher on the examples that a cache lacks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.filesize import decimal
from torch import Tensor

from kd_lightning.runtime.console import Pace
from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.manifest import LESS_ROOM
from kd_lightning.teachers.cache.outputs import named, specs_of
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cache.upkeep import Say, log
from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.types import Batch, ModelOutput, SparseLogits

Run = Callable[[Batch], ModelOutput]

_SAME = 1e-4
"""Allowed difference between two runs on one batch, as a share of the largest number: rounding, not dropout."""


@dataclass(frozen=True)
class Estimate:
    """How large a cache becomes.

    Attributes:
        bytes_per_example: On average.
        examples: N.
        missing: How many of them are not stored yet.
    """

    bytes_per_example: float
    examples: int
    missing: int

    def __str__(self) -> str:
        total = decimal(round(self.bytes_per_example * self.examples))
        return f"{decimal(round(self.bytes_per_example))} an example, {total} for all {self.examples:,}"


def estimate(
    cache: TeacherCache,
    output: ModelOutput,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    keep: Tensor | None = None,
) -> Estimate:
    """Estimate the size of a cache from a first output.

    Args:
        cache: The cache to be filled.
        output: The teacher's output for a batch.
        mask: The batch's attention mask, `(B, L)`; None for a network without one.
        lengths: The real tokens of every example, or of a random sample, `(M,)`; None uses this batch's.
        keep: The kept rows of logits per token, `(B, L)`, as a random sample of all.
    """
    specs = specs_of(output, mask, cache.manifest.storage, keep)
    per_token = any(spec.kind != "example" for spec in specs)
    if mask is not None and lengths is None:
        lengths = mask.bool().sum(1)
    tokens = torch.zeros(1) if lengths is None else lengths.double().cpu()
    mean, square = float(tokens.mean()), float(tokens.square().mean())
    rows = 0.0 if keep is None or mask is None else mean * float(keep.sum()) / max(float(mask.sum()), 1.0)
    size = sum(spec.unit_bytes * spec.units(mean, square, rows) for spec in specs) + (4 if per_token else 0)
    return Estimate(size, cache.manifest.num_examples, len(cache.missing()))


def check_room(cache: TeacherCache, size: Estimate) -> None:
    """Refuse a cache for which the disk has no room.

    Raises:
        CacheError: With the space needed, the space free and what to do.
    """
    needed, free = size.bytes_per_example * size.missing, shutil.disk_usage(cache.folder).free
    if needed > free:
        raise CacheError(
            f"{cache.folder} would take {decimal(round(needed))} ({decimal(round(size.bytes_per_example))} for each of "
            f"{size.missing:,} examples) and its disk has {decimal(free)} free: {LESS_ROOM}"
        )


def attention_mask(batch: Batch) -> Tensor | None:
    """Return the mask of the teacher's tokens: `teacher_attention_mask` if the batch has teacher entries."""
    own = any(name.startswith("teacher_") for name in batch)
    return batch.get("teacher_attention_mask" if own else "attention_mask")


def stored_rows(batch: Batch) -> Tensor | None:
    """Return which rows of the teacher's logits are stored: its own `teacher_keep`, `keep`, or None: all."""
    return batch.get("teacher_keep", batch.get("keep"))


def check_repeatable(teacher: Run, batch: Batch) -> ModelOutput:
    """Return the teacher's output for a batch, after running it twice.

    Raises:
        CacheError: The outputs differ, so they are no function of the example and cannot be cached.
    """
    first, second = teacher(batch), teacher(batch)
    for name, value in named(first).items():
        other = named(second).get(name)
        if other is None or other.shape != value.shape or not _same(value, other):
            raise CacheError(
                f"two runs of the teacher on the same batch differ in their {name}: something is random in each run "
                "(dropout in train mode, sampling, random masks). Put the teacher in eval mode and make random choices "
                "a function of the example's index, or set teacher.cache=off"
            )
    return first


def fill(
    cache: TeacherCache, teacher: Run, batches: Iterable[Batch], *, lengths: Tensor | None = None, say: Say = log.info,
    alone: bool = True,
) -> int:  # fmt: skip
    """Run the teacher on every example that the cache lacks, and store the outputs.

    The cache is locked meanwhile: a second process waits, and then finds that nothing is missing. The teacher runs only
    on the missing rows of a batch, and twice on the first batch (`check_repeatable`).

    Args:
        cache: The cache to fill.
        teacher: In eval mode: maps a batch to its output, on any device.
        batches: Batches that together contain every example, in any order.
        lengths: The real tokens of every example, to estimate the size; None uses the first batch's.
        say: Receives the size before anything is written, and the process that this one waits for.
        alone: False: the batches are this process's share, others have the rest, and nobody waits.

    Returns:
        The number of examples that the teacher ran on.

    Raises:
        CacheError: An example is in no batch; the teacher is not repeatable; outputs are not finite; the disk is too
            small, or full.
    """
    with cache.writing(say, alone):
        begun, count = False, 0
        if not len(cache.missing()):
            return 0
        for batch in batches:
            fresh = ~cache.known(batch["index"])
            if not fresh.any():
                continue
            part = batch if fresh.all() else {name: value[fresh.to(value.device)] for name, value in batch.items()}
            before = PREDICTING.seconds
            output = teacher(part) if begun else check_repeatable(teacher, part)
            seconds = PREDICTING.seconds - before
            mask = attention_mask(part)
            if not begun:
                size = estimate(cache, output, mask, lengths, stored_rows(part))
                say(f"teacher outputs: {size}, in {cache.folder}")
                check_room(cache, size)
                begun = True
            count += len(part["index"])
            cache.add(part["index"], output, mask, seconds, stored_rows(part))
    if alone and not cache.complete:
        number = cache.manifest.num_examples
        raise CacheError(
            f"the batches had {number - len(cache.missing())} of {number} examples: the data must contain each of "
            "them, numbered from 0 in `index`"
        )
    return count


def reported(batches: Iterable[Batch], missing: Tensor, lengths: Tensor, say: Say) -> Iterator[Batch]:
    """Yield batches, and say now and then how many of the missing examples were in them.

    Args:
        batches: Batches that together contain every example.
        missing: The examples that the teacher runs on.
        lengths: The real tokens of every example.
        say: Receives the lines.
    """
    waiting = torch.zeros(len(lengths), dtype=torch.long)
    waiting[missing] = lengths[missing].long().clamp(min=1)
    examples, done, total, pace = 0, 0.0, float(waiting.sum()), Pace()
    for batch in batches:
        yield batch
        tokens = waiting[batch["index"]]
        examples, done = examples + int((tokens > 0).sum()), done + float(tokens.sum())
        if pace.due:
            say(f"teacher  predicted {examples:,} of {len(missing):,} examples, {pace.left(done, total)}")


def _same(value: Tensor | SparseLogits, other: Tensor | SparseLogits) -> bool:
    # of logits that are kept rounding may decide which they are
    value, other = (x.rest if isinstance(x, SparseLogits) else x for x in (value, other))
    if torch.equal(value, other):
        return True
    largest = float(value.detach().float().nan_to_num().abs().max()) if value.numel() else 0.0
    return torch.allclose(value.float(), other.float(), rtol=0.0, atol=_SAME * largest, equal_nan=True)
