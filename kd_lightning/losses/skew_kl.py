"""Skew KL: divergence from a mixture with the other side, which bounds it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, skewed, softened
from kd_lightning.losses.term import Reduction, Scheduled, in_float32, reduce
from kd_lightning.types import Batch

Direction = Literal["forward", "reverse"]


@in_float32
def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    skew: float = 0.1,
    direction: Direction = "forward",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Skew Kullback-Leibler divergence (Ko et al. 2024, DistiLLM, arXiv 2402.03898), in nats.

    .. math:: \text{forward: } T^2 \, \mathrm{KL}(p_t \,\|\, \lambda p_t + (1 - \lambda) p_s) \qquad
              \text{reverse: } T^2 \, \mathrm{KL}(p_s \,\|\, \lambda p_s + (1 - \lambda) p_t)

    with :math:`p = \mathrm{softmax}(z / T)` and the skew :math:`\lambda` (the paper's alpha). It is at most
    :math:`-T^2 \log \lambda`, however unlikely the one side finds what the other does, so that no single example or
    token dominates a batch. At lambda = 0 it is the plain divergence.
    The paper takes T = 1; T^2 is as in `soft_target`. The teacher's logits get no gradient. Labels are not read.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite.
        teacher_logits: The same shape, finite.
        temperature: T > 0; larger is softer.
        skew: lambda in [0, 1), the share of the first distribution in the mixture.
        direction: `forward` starts from the teacher's distribution, `reverse` from the student's.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, a temperature that is not positive and finite, or a skew or direction that does
            not exist.

    Example:
        >>> import torch
        >>> far = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
        >>> round(skew_kl(*far, skew=0.1).item(), 6)  # -log 0.1, where the plain divergence is 200
        2.302585
    """
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew must be in [0, 1), got {skew}")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be forward or reverse, got {direction!r}")
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    log_p, log_q = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    return temperature**2 * reduce(skewed(log_p, log_q, skew), mask, reduction)


class SkewKLLoss(LogitTerm):
    """Distillation by skew KL; see `skew_kl` for the formula.

    Args:
        temperature: As for `LogitTerm`.
        skew: The share of the first distribution in the mixture, in [0, 1).
        direction: `forward` or `reverse`.
        classes: As for `LogitTerm`.
    """

    def __init__(
        self,
        temperature: Scheduled = 1.0,
        skew: float = 0.1,
        direction: Direction = "forward",
        classes: int | None = None,
    ) -> None:
        super().__init__(temperature, classes)
        self.skew: float = skew
        self.direction: Direction = direction

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T^2 times the skew divergence."""
        return skew_kl(student, teacher, self.now(self.temperature), self.skew, self.direction, mask)
