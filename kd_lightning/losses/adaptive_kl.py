"""Adaptive KL: forward KL where the head of the distribution is off, reverse KL where the tail is."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, kl, softened
from kd_lightning.losses.term import Reduction, Scheduled, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def adaptive_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    head_mass: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Forward and reverse KL weighted by head and tail errors (Wu et al. 2024, arXiv 2404.02657), in nats.

    .. math:: T^2 \left[ w \, \mathrm{KL}(p_t \| p_s) + (1 - w) \, \mathrm{KL}(p_s \| p_t) \right], \quad
              w = \frac{\sum_{c \in H} |p_{t,c} - p_{s,c}|}{\sum_c |p_{t,c} - p_{s,c}|}, \quad
              p = \mathrm{softmax}(z / T)

    for each example. H, the head, is the fewest classes, by the teacher's probability, that together have at least
    `head_mass`. (Published code leaves the class that reaches `head_mass` in the tail; this follows the paper.) With
    two classes both gaps are the same, and it is the mean of the two divergences, as long as `head_mass` is at most
    the teacher's larger probability; beyond that both classes are the head, and only the forward KL is left. The
    weight w gets no gradient, nor do the teacher's logits. The paper takes T = 1; T^2 is as in `soft_target`. Labels
    are not read.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite.
        teacher_logits: The same shape, finite.
        temperature: T > 0; larger is softer.
        head_mass: The paper's mu, in (0, 1).
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, a temperature that is not positive and finite, or `head_mass` out of range.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.2, 0.8]]).log()
        >>> round(adaptive_kl(student, teacher).item(), 6)  # (0.192745 + 0.223144) / 2
        0.207944
    """
    if not 0.0 < head_mass < 1.0:
        raise ValueError(f"head_mass must be in (0, 1), got {head_mass}")
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    weight = _share_of_head(log_s.detach().exp(), log_t.exp(), head_mass)
    values = weight * kl(log_t, log_s) + (1 - weight) * kl(log_s, log_t)
    return temperature**2 * reduce(values, mask, reduction)


def _share_of_head(student: Tensor, teacher: Tensor, head_mass: float) -> Tensor:
    """Return the share of the probability gap in the teacher's head; 0 if there is no gap."""
    teacher, order = teacher.sort(dim=-1, descending=True)
    gaps = (teacher - student.gather(-1, order)).abs()
    head = teacher.cumsum(-1) - teacher < head_mass  # the classes before it are not enough
    return gaps.masked_fill(~head, 0.0).sum(-1) / gaps.sum(-1).clamp(min=torch.finfo(gaps.dtype).tiny)


class AdaptiveKLLoss(LogitTerm):
    """Distillation by adaptive KL; see `adaptive_kl` for the formula.

    Args:
        temperature: As for `LogitTerm`.
        head_mass: The probability that makes the head of the teacher's distribution, in (0, 1).
        classes: As for `LogitTerm`.
    """

    def __init__(self, temperature: Scheduled = 1.0, head_mass: float = 0.5, classes: int | None = None) -> None:
        super().__init__(temperature, classes)
        self.head_mass = head_mass

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T^2 times the weighted divergences."""
        return adaptive_kl(student, teacher, self.now(self.temperature), self.head_mass, mask)
