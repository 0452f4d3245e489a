"""Total variation: half the absolute difference of probabilities."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, half_distance, softened
from kd_lightning.losses.term import Reduction, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Total variation distance of the softened distributions (Wen et al. 2023, arXiv 2307.15190).

    .. math:: \frac{T}{2} \sum_c \left| \mathrm{softmax}(z_t / T)_c - \mathrm{softmax}(z_s / T)_c \right|

    It is symmetric, between 0 and T, and at most :math:`T \sqrt{\mathrm{KL} / 2}` (Pinsker). It shrinks with 1 / T and
    a KL divergence with 1 / T^2, so that here T is the factor that keeps the gradient's scale; the paper takes T = 1. A
    student that is certain and wrong has next to no gradient, unlike under forward KL. The teacher's logits get no
    gradient. Labels are not read.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite.
        teacher_logits: The same shape, finite.
        temperature: T > 0; larger is softer.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(total_variation(student, teacher).item(), 6)
        0.25
    """
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    return temperature * reduce(half_distance(log_t, log_s), mask, reduction)


class TotalVariationLoss(LogitTerm):
    """Distillation by total variation; see `total_variation`, and `LogitTerm` for the arguments."""

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T times the total variation distance."""
        return total_variation(student, teacher, self.now(self.temperature), mask)
