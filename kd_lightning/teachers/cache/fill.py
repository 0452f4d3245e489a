"""Having a teacher answer what a cache does not hold yet."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from rich.filesize import decimal
from torch import Tensor

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.manifest import LESS_ROOM
from kd_lightning.teachers.cache.outputs import named, specs_of
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cache.upkeep import Say, log
from kd_lightning.types import Batch, ModelOutput

Ask = Callable[[Batch], ModelOutput]

_SAME = 1e-4
"""How far, as a share of the largest number, two answers to the same question may lie apart: rounding, not dropout."""


@dataclass(frozen=True)
class Estimate:
    """How large a cache becomes.

    Attributes:
        bytes_per_example: On average.
        examples: N.
        missing: How many of them are still to be answered.
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
    """Say from a first answer how large the cache becomes.

    Args:
        cache: Where it is going to be added.
        output: The teacher's answer to a batch.
        mask: The batch's attention mask, `(B, L)`; None for a network without one.
        lengths: The real tokens of every example, or of a fair sample, `(M,)`; None takes this batch for one.
        keep: Which rows of logits per token are kept, `(B, L)`; taken for a fair sample of all.
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
    """Refuse to begin what the disk has no room for.

    Raises:
        CacheError: Says what is needed, what is free and what can be done.
    """
    needed, free = size.bytes_per_example * size.missing, shutil.disk_usage(cache.folder).free
    if needed > free:
        raise CacheError(
            f"{cache.folder} would take {decimal(round(needed))} ({decimal(round(size.bytes_per_example))} for each of "
            f"{size.missing:,} examples) and its disk has {decimal(free)} free: {LESS_ROOM}"
        )


def attention_mask(batch: Batch) -> Tensor | None:
    """Return the mask of the tokens that the teacher reads: its own where the batch has entries of its own for it."""
    own = any(name.startswith("teacher_") for name in batch)
    return batch.get("teacher_attention_mask" if own else "attention_mask")


def check_repeatable(ask: Ask, batch: Batch) -> ModelOutput:
    """Return the teacher's answer to a batch, after asking it twice.

    Raises:
        CacheError: It answered differently: its answers are not a function of the example, so none of them is cached.
    """
    first, second = ask(batch), ask(batch)
    for name, value in named(first).items():
        other = named(second).get(name)
        if other is None or other.shape != value.shape or not _same(value, other):
            raise CacheError(
                f"the teacher answered the same batch twice and its {name} differ: something in it is drawn anew each "
                "time (dropout in train mode, sampling, random masks). Put it in eval mode and make what is drawn a "
                "function of the example's index, or set teacher.cache=off"
            )
    return first


def fill(
    cache: TeacherCache, ask: Ask, batches: Iterable[Batch], *, lengths: Tensor | None = None, say: Say = log.info
) -> int:
    """Have the teacher answer every example that the cache has no answer to; write the answers.

    The cache is locked meanwhile: a second process waits, and then finds that nothing is missing. Only the missing rows
    of a batch are asked about. The first batch is asked about twice (`check_repeatable`).

    Args:
        cache: What is filled.
        ask: The teacher, in eval mode: from a batch as it comes to its answer, on any device.
        batches: Which together show every example, in any order.
        lengths: The real tokens of every example, for the estimate of the size; None takes the first batch's.
        say: Told how large the cache becomes, before anything is written, and whom this process waits for.

    Returns:
        How many examples were asked about.

    Raises:
        CacheError: Not every example was shown; the teacher answers differently each time; answers that are not finite;
            a disk that is too small, or full.
    """
    with cache.writing(say):
        wanted = len(cache.missing())
        if wanted == 0:
            return 0
        begun = False
        for batch in batches:
            fresh = ~cache.known(batch["index"])
            if not fresh.any():
                continue
            part = batch if fresh.all() else {name: value[fresh.to(value.device)] for name, value in batch.items()}
            started = time.monotonic()
            output = ask(part) if begun else check_repeatable(ask, part)
            seconds = time.monotonic() - started
            mask = attention_mask(part)
            if not begun:
                size = estimate(cache, output, mask, lengths, part.get("keep"))
                say(f"teacher outputs: {size}, in {cache.folder}")
                check_room(cache, size)
                begun = True
            cache.add(part["index"], output, mask, seconds, part.get("keep"))
    if not cache.complete:
        number = cache.manifest.num_examples
        raise CacheError(
            f"the teacher was shown {number - len(cache.missing())} of {number} examples: the data must show each of "
            "them, and number them from 0 in `index`"
        )
    return wanted


def _same(value: Tensor, other: Tensor) -> bool:
    largest = float(value.detach().float().nan_to_num().abs().max()) if value.numel() else 0.0
    return torch.allclose(value.float(), other.float(), rtol=0.0, atol=_SAME * largest, equal_nan=True)
