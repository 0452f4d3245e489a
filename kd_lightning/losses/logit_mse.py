"""Logit matching: the student regresses the teacher's logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import (
    Averages,
    Reduction,
    Term,
    check_mask,
    check_same_shape,
    compared_logits,
    in_float32,
    only_counted,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def logit_mse(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mean squared difference of logits (Ba & Caruana 2014, arXiv 1312.6184).

    .. math:: \frac{1}{C} \sum_c (z_{s,c} - z_{t,c})^2

    averaged over the examples (or positions) that count. As the temperature grows, soft targets (T^2 times
    the KL) become half of it, for logits of equal mean (Hinton et al. 2015, arXiv 1503.02531, section 2.1); unlike them
    it also matches the mean.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`.
        teacher_logits: The same shape; gets no gradient.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> logit_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])).item()
        2.5
    """
    check_same_shape(student_logits, teacher_logits)
    check_mask(mask, student_logits.shape[:-1])
    student, teacher = only_counted(student_logits, mask), only_counted(teacher_logits.detach(), mask)
    values = F.mse_loss(student, teacher, reduction="none").mean(-1)
    return reduce(values, mask, reduction)


class LogitMSELoss(Term):
    """Matching logits; see `logit_mse` for the formula.

    Args:
        classes: Compare only the first `classes` logits of each side; see `compared_logits`.
    """

    averages: Averages = "logits"

    def __init__(self, classes: int | None = None) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean squared difference over examples or valid positions."""
        return logit_mse(*compared_logits(student, teacher, batch, self.classes))
