"""What every loss term is, and the masked mean they share.

Shape suffixes used in this package: B examples, L positions, C classes (or V, the vocabulary).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from kd_lightning.types import IGNORE, Batch, ModelOutput

Reduction = Literal["mean", "sum", "none"]
Scheduled = float | Callable[[float], float]
"""A number, or a function of training progress (0 at the first step, 1 at the last)."""


class Term(nn.Module, ABC):
    """A loss term: a scalar from what student and teacher said of a batch. It knows nothing of its own weight.

    Attributes:
        uses_teacher: False when the term reads nothing of the teacher, so that its forward pass can be saved.
        progress: Share of the training that is done, in [0, 1]; set by the objective before each step.
    """

    uses_teacher: bool = True
    progress: float = 0.0

    def now(self, value: Scheduled) -> float:
        """Return a scheduled value at the present progress."""
        return value(self.progress) if callable(value) else value

    def settings(self) -> dict[str, float]:
        """Return the scheduled values now in force, to be logged."""
        return {}

    @abstractmethod
    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the term's value for this batch, a scalar."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision values as float32: sums of exponentials of them are not safe in 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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


def counted_positions(logits: Tensor, batch: Batch, causal: bool) -> tuple[slice, Tensor | None]:
    """Say which positions of sequence logits count.

    Args:
        logits: `(B, C)`, or `(B, L, V)` for token-level outputs.
        batch: Read for `labels` `(B, L)`, else `attention_mask` `(B, L)`.
        causal: Position t answers for token t + 1, so the last position has no token to answer for.

    Returns:
        The slice of positions to keep and their mask `(B, L')`, or `(slice(None), None)` for `(B, C)` logits.

    Raises:
        ValueError: Token-level logits and a batch that says nothing of its positions.
    """
    if logits.ndim == 2:
        return slice(None), None
    labels = batch.get("labels")
    if labels is not None and labels.shape == logits.shape[:2]:
        counts = labels != IGNORE
    elif "attention_mask" in batch:
        counts = batch["attention_mask"].bool()
        if causal:  # the last padding on the left has read nothing: it does not answer for the first token
            counts = torch.cat([counts[:, :1], counts[:, 1:] & counts[:, :-1]], dim=1)
    else:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} are per position, but the batch has neither labels of shape "
            f"{tuple(logits.shape[:2])} nor an attention_mask to tell which positions count"
        )
    return (slice(0, -1), counts[:, 1:]) if causal else (slice(None), counts)
