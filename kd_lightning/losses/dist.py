"""DIST: the student's predictions correlate with the teacher's, across classes and across examples."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, softened
from kd_lightning.losses.term import Scheduled, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Correlation distances between predictions (Huang et al. 2022, DIST, arXiv 2205.10536).

    .. math:: \frac{\beta}{B} \sum_i \left[ 1 - \rho(p_{s,i \cdot}, p_{t,i \cdot}) \right]
              + \frac{\gamma}{C} \sum_c \left[ 1 - \rho(p_{s,\cdot c}, p_{t,\cdot c}) \right], \quad
              p = \mathrm{softmax}(z / T)

    with Pearson's correlation rho over the classes of an example (inter-class), and over the batch's examples for each
    class (intra-class). Correlation ignores scale and offset, so a student may be less, or more, confident than its
    teacher: a positive affine map of p costs nothing, and one of the logits next to nothing at a high temperature.
    Correlations do not shrink with T, so there is no factor T^2 (the published code has one, the paper's formula not).

    Where either side is constant, but for rounding, there is nothing to correlate: the distance is defined as 0,
    without a gradient. A class that is unlikely for all examples counts as much as any, however unlikely it is. So
    with one example the intra-class part is 0. With *two classes* every inter-class correlation is 1 or -1, without a
    gradient, and the student learns from the intra-class part alone. Positions of all sequences are examples of one
    batch. The intra-class part depends on the batch: microbatches do not average to the whole. The teacher's logits get
    no gradient. Labels are not read.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite.
        teacher_logits: The same shape, finite.
        temperature: T > 0; larger is softer.
        inter_weight: beta.
        intra_weight: gamma.
        mask: `(B,)` or `(B, L)` bool, True = counts.

    Raises:
        ValueError: Shapes that differ, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.3, 0.3, 0.4], [0.4, 0.3, 0.3]]).log()
        >>> teacher = torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]).log()
        >>> round(dist(student, teacher).item(), 6)
        0.0
    """
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    log_s, log_t = log_s.flatten(0, -2), log_t.flatten(0, -2)
    if not len(log_s):
        return log_s.sum()
    rows = torch.ones_like(log_s[:, 0], dtype=torch.bool) if mask is None else mask.flatten()
    counts = rows.unsqueeze(1).expand_as(log_s)
    inter = reduce(_distance(log_s, log_t, counts, dim=1), rows, "mean")
    return inter_weight * inter + intra_weight * _distance(log_s, log_t, counts, dim=0).mean()


def _distance(student: Tensor, teacher: Tensor, counts: Tensor, dim: int) -> Tensor:
    """Return 1 - Pearson's correlation of counted probabilities along an axis; 0 if a side is constant.

    Args:
        student: Log-probabilities `(B, C)`.
        teacher: The same.
        counts: `(B, C)` bool.
        dim: The axis.
    """
    (unit_s, varies_s), (unit_t, varies_t) = (_centred_unit(x, counts, dim) for x in (student, teacher))
    # of unit vectors, 1 - u.v is |u - v|^2 / 2, which loses nothing to cancellation where they nearly agree
    return ((unit_s - unit_t).square().sum(dim) / 2).masked_fill(~(varies_s & varies_t).squeeze(dim), 0.0)


def _centred_unit(log_x: Tensor, counts: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return x less its mean, scaled to length 1, and whether it varies by more than rounding.

    First x is scaled to a largest entry of 1: a class that is far below the top for all examples has probabilities
    whose squares are no float32, and the square root of a subnormal has no finite gradient.
    """
    log_x = log_x.masked_fill(~counts, -torch.inf)
    largest = log_x.detach().amax(dim, keepdim=True).masked_fill(~counts.any(dim, keepdim=True), 0.0)
    x = (log_x - largest).exp()
    mean = x.sum(dim, keepdim=True) / counts.sum(dim, keepdim=True).clamp(min=1)
    deviation = (x - mean).masked_fill(~counts, 0.0)
    square = deviation.square().sum(dim, keepdim=True)
    # not `>`, by which NaN would be a constant
    varies = ~(square <= (10 * torch.finfo(x.dtype).eps) ** 2 * x.square().sum(dim, keepdim=True))
    return deviation / square.masked_fill(~varies, 1.0).sqrt(), varies


class DISTLoss(LogitTerm):
    """Distillation by correlation; see `dist` for the formula.

    Args:
        temperature: As for `LogitTerm`.
        inter_weight: beta, the weight of the correlations over an example's classes.
        intra_weight: gamma, the weight of the correlations over the batch for a class.
        classes: As for `LogitTerm`.
    """

    def __init__(
        self,
        temperature: Scheduled = 1.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        classes: int | None = None,
    ) -> None:
        super().__init__(temperature, classes)
        self.inter_weight, self.intra_weight = inter_weight, intra_weight

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return the weighted correlation distances of the batch."""
        return dist(student, teacher, self.now(self.temperature), self.inter_weight, self.intra_weight, mask)
