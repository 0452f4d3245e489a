"""Decoupled distillation: how likely the label is, and how the rest is spread, weighted apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, at_label, is_label, kl, labelled, log_probs_of_others, softened
from kd_lightning.losses.term import Averages, Reduction, Scheduled, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679), in nats.

    .. math:: T^2 \left[ \alpha \, \mathrm{KL}(b_t \| b_s) + \beta \, \mathrm{KL}(\hat p_t \| \hat p_s) \right], \quad
              b = (p_y, 1 - p_y), \quad \hat p_c = \frac{p_c}{1 - p_y} \; (c \ne y), \quad
              p = \mathrm{softmax}(z / T)

    With alpha = 1 and, for each example, beta = 1 - p_{t,y} it is `soft_target`, in which a teacher that is sure of the
    label gives the other classes little weight; DKD removes this. With *two classes* the second part is empty and 0,
    and the loss is alpha times `soft_target`. Examples *without a label* (-100) do not count. The teacher's logits get
    no gradient. The published code raises this term's weight over the first epochs; here that is a schedule of the
    weight.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite, C >= 2.
        teacher_logits: The same shape, finite.
        labels: `(B,)` or `(B, L)` int64; -100 does not count.
        temperature: T > 0; larger is softer.
        target_weight: alpha.
        non_target_weight: beta. The paper takes 1 to 8 for 100 classes, 0.5 for 1000.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, fewer than two classes, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> teacher = torch.tensor([[0.5, 0.1, 0.4]]).log()  # the same for the label, (1/5, 4/5) for the others
        >>> round(dkd(student, teacher, torch.tensor([0]), non_target_weight=1.0).item(), 6)
        0.192745
    """
    labels, counts = labelled(labels, student_logits, mask)
    log_s, log_t = softened(student_logits, teacher_logits, temperature, counts)
    target = kl(_label_or_not(log_t, labels), _label_or_not(log_s, labels))
    non_target = kl(log_probs_of_others(log_t, labels), log_probs_of_others(log_s, labels))
    return temperature**2 * reduce(target_weight * target + non_target_weight * non_target, counts, reduction)


def _label_or_not(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return log (p_y, 1 - p_y), `(..., 2)`, without the cancellation of 1 - p."""
    others = log_probs.masked_fill(is_label(labels, log_probs.shape[-1]), -math.inf)
    return torch.stack([at_label(log_probs, labels), others.logsumexp(-1)], dim=-1)


class DKDLoss(LogitTerm):
    """Decoupled distillation; see `dkd` for the formula. Reads `labels`.

    Args:
        temperature: As for `LogitTerm`.
        target_weight: alpha, the weight of how likely the label is.
        non_target_weight: beta, the weight of how the other classes share the rest.
        classes: As for `LogitTerm`.
    """

    averages: Averages = "labels"

    def __init__(
        self,
        temperature: Scheduled = 1.0,
        target_weight: float = 1.0,
        non_target_weight: float = 8.0,
        classes: int | None = None,
    ) -> None:
        super().__init__(temperature, classes)
        self.target_weight, self.non_target_weight = target_weight, non_target_weight

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T^2 times the weighted parts, averaged over what has a label."""
        weights = self.target_weight, self.non_target_weight
        return dkd(student, teacher, batch["labels"], self.now(self.temperature), *weights, mask)
