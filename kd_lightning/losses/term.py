"""`Term`, the base class of loss terms, and the masked mean they share.

Shape suffixes used in this package: B examples, L positions, C classes (or V, the vocabulary).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from kd_lightning.types import Batch, ModelOutput, is_labelled

Reduction = Literal["mean", "sum", "none"]
Scheduled = float | Callable[[float], float]
"""A number, or a function of training progress (0 at the first step, 1 at the last)."""
Averages = Literal["examples", "sequences", "labels", "logits", "tokens"]
Depth = Callable[[str], int]
"""How many layers a network has of a kind: `hidden`, `attention`, `qkv` or `feature_maps`."""
P = ParamSpec("P")
R = TypeVar("R")


class Term(nn.Module, ABC):
    """A loss term: a scalar, without its weight, from student and teacher outputs for a batch.

    Before the first step `plan` gets the networks' depths, to choose the features a term needs, and `connect` their
    outputs, to build what depends on sizes. Most terms need neither.

    Attributes:
        uses_teacher: False if the term uses no teacher output, so that its forward pass can be skipped.
        needs_student: Names of the student's features it reads; see `kd_lightning.models.features`.
        needs_teacher: The same of the teacher.
        progress: Share of the training that is done, in [0, 1]; set by the objective before each step.
        averages: What its mean is over: `examples`; `sequences`, examples with any token that is no padding; `logits`,
            the rows that are kept; those of them with `labels`; `tokens` that are no padding. What the mean over
            several batches is weighted by; see `counts`.
    """

    averages: Averages = "examples"
    uses_teacher: bool = True
    needs_student: tuple[str, ...] = ()
    needs_teacher: tuple[str, ...] = ()
    progress: float = 0.0

    def plan(self, student: Depth, teacher: Depth) -> None:
        """Set `needs_student` and `needs_teacher` if they depend on the networks' depths."""

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build what depends on the networks' sizes (projectors, memories), before the optimizer is made.

        Args:
            student: The student's output for one batch, in eval mode.
            teacher: The teacher's output for it.
            examples: How many examples the data has: every `index` is below.
        """

    def counts(self, batch: Batch) -> Tensor:
        """Return how many things each of its means over a batch is over, `(P,)` float32; see `parts`."""
        return self.count(batch, self.averages)

    def count(self, batch: Batch, averages: Averages) -> Tensor:
        """Return how many things a mean over a batch is over, `(1,)` float32."""
        labels, mask, keep = (batch.get(name) for name in ("labels", "attention_mask", "keep"))
        counted = None
        if averages == "tokens":
            counted = mask
        elif averages == "sequences" and mask is not None:
            counted = mask.any(1)
        elif averages == "logits":
            counted = keep
        elif averages == "labels" and labels is not None:
            counted = is_labelled(labels) if keep is None else is_labelled(labels) & keep
        if counted is None:
            first = next(iter(batch.values()))
            return torch.full((1,), float(len(first)), device=first.device)
        return counted.sum(dtype=torch.float32).view(1)

    def share(self, own: Tensor, mean: Tensor) -> Tensor:
        """Return the factors of the `parts` that make averages over a step's batches means over the step.

        Args:
            own: The batch's `counts`.
            mean: Their average over the batches of the step.
        """
        return own / mean.clamp(min=torch.finfo(torch.float32).tiny)

    def parts(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the means that add up to the value, `(P,)`, one for each of `counts`.

        Most terms are one mean. One that is built of means over different things, as over the labelled examples and
        over all, overrides this.
        """
        value: Tensor = self(student, teacher, batch)
        return value.view(1)

    def now(self, value: Scheduled) -> float:
        """Return the current value of a number or schedule."""
        return value(self.progress) if callable(value) else value

    def settings(self) -> dict[str, float]:
        """Return the current scheduled values, to be logged."""
        return {}

    @abstractmethod
    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the term's value for this batch, a scalar."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision values as float32: sums of exponentials of them are not safe in 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Compute a loss in float32, or float64 for float64 inputs: casts half precision, disables autocast.

    Autocast would do the products of matrices in a loss in 16 bits even for float32 arguments.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(next(_tensors([*args, *kwargs.values()])).device.type, enabled=False):
            return function(*(_widened(x) for x in args), **{key: _widened(x) for key, x in kwargs.items()})

    return wrapped


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return at_least_float32(value)
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value


def check_same_shape(student: Tensor, teacher: Tensor, what: str = "logits") -> None:
    """Refuse tensors that cannot be compared entry by entry.

    Raises:
        ValueError: Names both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {what} {tuple(student.shape)} and teacher {what} {tuple(teacher.shape)} must have the same shape"
        )


def check_mask(mask: Tensor | None, shape: tuple[int, ...] | torch.Size) -> None:
    """Refuse a mask that does not have one entry for each value that may count.

    Raises:
        ValueError: Names both shapes.
    """
    if mask is not None and mask.shape != torch.Size(shape):
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape {tuple(shape)}")


def check_positive(name: str, value: float) -> None:
    """Refuse what is not a positive, finite number, such as a temperature.

    Raises:
        ValueError: Names the parameter and its value.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value}")


def only_counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x with zeros where `mask` is False, so that masked entries affect neither value nor gradient.

    To mask a loss's values is not enough: NaN times an upstream gradient of zero is NaN.

    Args:
        x: `(B, ...)`, for tokens `(B, L, ...)`.
        mask: Of the first axes, True = counts; None = all count.
    """
    return x if mask is None else x.masked_fill(~mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), 0.0)


def reduce(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Sum or average values where `mask` is True; where it is nowhere True, a zero that still has a graph.

    Args:
        values: Any shape.
        mask: The same shape, True = counts; None = all count.
        reduction: `mean` divides by the number that count; `none` returns masked values, zero where they don't count.
    """
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    count = mask.sum().clamp(min=1) if mask is not None else max(values.numel(), 1)
    return total / count


def kept_rows(logits: Tensor, batch: Batch) -> Tensor | None:
    """Return which rows of logits count: all of `(B, C)`, of `(B, L, V)` those that the batch keeps.

    Args:
        logits: `(B, C)`, or `(B, L, V)` for token-level outputs.
        batch: Of tokens, as `Task.compared` returns it: `keep` `(B, L)` and `labels` `(B, L)` are of the same rows.

    Returns:
        `(B, L)` bool; None for `(B, C)` logits.

    Raises:
        ValueError: Token-level logits, and no `keep` of their shape; or they are of starts and ends of spans.
    """
    if logits.ndim == 2:
        return None
    if "question" in batch:
        raise ValueError(
            "it compares the classes of a row, and logits of starts and ends of spans are compared over positions: use "
            "distillation=span_soft_target or another for spans"
        )
    keep = batch.get("keep")
    if keep is None or keep.shape != logits.shape[:-1]:
        given = "no `keep`" if keep is None else f"`keep` {tuple(keep.shape)}"
        raise ValueError(
            f"logits {tuple(logits.shape)} have a row for each position, and the batch has {given} for which count: a "
            f"task of tokens gives it as {tuple(logits.shape[:-1])} bool in `Task.compared`"
        )
    return keep


def compared_logits(
    student: ModelOutput, teacher: ModelOutput, batch: Batch, classes: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both sides' logits, aligned class by class, and the mask of rows that count.

    Args:
        student: With logits `(B, C)` or `(B, L, V)`.
        teacher: With logits of as many classes, or more than `classes`.
        batch: As for `kept_rows`.
        classes: Keep only the first `classes` logits of each side: for vocabularies that differ in padding ids at the
            end.

    Raises:
        ValueError: The numbers of classes differ and `classes` is None.
    """
    sizes = student.logits.shape[-1], teacher.logits.shape[-1]
    if teacher.sparse is not None:
        raise ValueError(
            "it compares all logits, and the teacher gives only some of them (teacher.cache_top_k, cache_samples): use "
            "distillation=sparse_kd, or keep all"
        )
    if classes is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has {sizes[0]} classes and the teacher {sizes[1]}: soft targets compare class by class. "
            "If they differ only in padding ids at the end, set this loss's `classes` to the real number"
        )
    if classes is not None and classes > min(sizes):
        raise ValueError(f"classes={classes}, but the student has {sizes[0]} and the teacher {sizes[1]}")
    return student.logits[..., :classes], teacher.logits[..., :classes], kept_rows(student.logits, batch)


def token_mask(batch: Batch, student: Tensor, teacher: Tensor, axis: int = 1) -> Tensor | None:
    """Return which positions count of two per-token features that are compared position by position.

    Args:
        batch: Read for `attention_mask` `(B, L)`.
        student: `(B, L, ...)`, or with positions on another axis.
        teacher: The same.
        axis: Where the positions are; -1 for attentions `(B, H, L, L)`.

    Returns:
        `(B, L)` bool; None for vectors `(B, D)`, or where the batch has no mask (images), so that all count.

    Raises:
        ValueError: The two sides read different tokens.
    """
    mask = batch.get("attention_mask")
    if mask is None or student.ndim == 2:
        return None
    lengths = student.shape[axis], teacher.shape[axis]
    if lengths[0] != lengths[1] or "teacher_input_ids" in batch:
        raise ValueError(
            f"the student's feature has {lengths[0]} positions and the teacher's {lengths[1]}, of different tokens: "
            "they are compared position by position. Give both the same tokenizer (data.tokenizer), or use a loss on "
            "logits or on `pooled`"
        )
    return mask.bool()


def masked_mean(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return one vector `(B, D)` for each example: the mean of a feature over its positions that count.

    Args:
        feature: `(B, D)`, tokens `(B, L, D)` or a map `(B, D, H, W)`.
        mask: `(B, L)` bool for tokens; an example without any gives zeros.

    Raises:
        ValueError: A feature of another rank.
    """
    if feature.ndim == 2:
        return feature
    if feature.ndim == 4:
        return feature.mean((2, 3))
    if feature.ndim != 3:
        raise ValueError(f"feature {tuple(feature.shape)}: expected (B, D), tokens (B, L, D) or a map (B, D, H, W)")
    if mask is None:
        return feature.mean(1)
    check_mask(mask, feature.shape[:2])
    return only_counted(feature, mask).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
