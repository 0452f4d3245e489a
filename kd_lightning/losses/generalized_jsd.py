"""Generalized Jensen-Shannon divergence: between forward and reverse KL."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, jsd, softened
from kd_lightning.losses.reverse_kl import reverse_kl
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.term import Reduction, Scheduled, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence (Agarwal et al. 2023, GKD, arXiv 2306.13649), in nats.

    .. math:: T^2 \left[ \beta \, \mathrm{KL}(p_t \| m) + (1 - \beta) \, \mathrm{KL}(p_s \| m) \right], \quad
              m = \beta p_t + (1 - \beta) p_s, \quad p = \mathrm{softmax}(z / T)

    for beta in (0, 1), with log m computed from log probabilities. At the ends it is defined as the forward KL,
    :math:`T^2 \mathrm{KL}(p_t \| p_s)` (beta = 0), and the reverse, :math:`T^2 \mathrm{KL}(p_s \| p_t)` (beta = 1),
    because that is what it is proportional to there: divided by beta it tends to the one as beta goes to 0, divided by
    1 - beta to the other as beta goes to 1. It is thereby *discontinuous at both ends*: undivided it tends to 0.
    With beta near an end the gradient is small by that factor; raise the term's weight, or take the end itself.

    The paper takes T = 1; T^2 is as in `soft_target`. The teacher's logits get no gradient. Labels are not read. The
    same definition as `fused_linear_kd(divergence="jsd")`, which takes beta in (0, 1) only.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite.
        teacher_logits: The same shape, finite.
        temperature: T > 0; larger is softer.
        beta: The teacher's share of the mixture m, in [0, 1].
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, a temperature that is not positive and finite, or beta out of range.

    Example:
        >>> import torch
        >>> far = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
        >>> round(generalized_jsd(*far).item(), 6)  # the most it can be at beta = 1/2: log 2
        0.693147
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if beta == 0.0:
        return soft_target(student_logits, teacher_logits, temperature, mask, reduction)
    if beta == 1.0:
        return reverse_kl(student_logits, teacher_logits, temperature, mask, reduction)
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * reduce(jsd(log_t, log_s, beta), mask, reduction)


class GeneralizedJSDLoss(LogitTerm):
    """Distillation by the generalized Jensen-Shannon divergence; see `generalized_jsd` for the formula.

    Args:
        temperature: As for `LogitTerm`.
        beta: The teacher's share of the mixture, in [0, 1]: 0 is forward KL, 1 reverse KL.
        classes: As for `LogitTerm`.
    """

    def __init__(self, temperature: Scheduled = 1.0, beta: float = 0.5, classes: int | None = None) -> None:
        super().__init__(temperature, classes)
        self.beta = beta

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T^2 JSD."""
        return generalized_jsd(student, teacher, self.now(self.temperature), self.beta, mask)
