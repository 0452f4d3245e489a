"""Normalized distillation: cross-entropies with the teacher's label probability and normalized rest."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, at_label, labelled, log_probs_of_others, softened
from kd_lightning.losses.term import Averages, Reduction, Scheduled, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    non_target_weight: float = 1.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Normalized knowledge distillation (Yang et al. 2023, arXiv 2303.13005), in nats.

    .. math:: - p_{t,y} \log p_{s,y} - \gamma \, T^2 \sum_{c \ne y} \hat p_{t,c} \log \hat p_{s,c}, \quad
              p = \mathrm{softmax}(z), \quad
              \hat p = \mathrm{softmax}\left((z_c / T)_{c \ne y}\right)

    The first part is the label's cross-entropy weighted by how sure the teacher is of it, always at temperature 1; the
    second compares the other classes, normalized on both sides so that a student can match them exactly. Both are
    cross-entropies, not divergences: where student and teacher agree it is not 0. With *two classes* the second part is
    empty and 0. Examples *without a label* (-100) do not count. The teacher's logits get no gradient.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite, C >= 2.
        teacher_logits: The same shape, finite.
        labels: `(B,)` or `(B, L)` int64; -100 does not count.
        temperature: T > 0 of the second part; larger is softer.
        non_target_weight: gamma.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, fewer than two classes, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> round(nkd(student, teacher, torch.tensor([0])).item(), 6)  # log(4) / 2
        0.693147
    """
    labels, counts = labelled(labels, student_logits, mask)
    log_s, log_t = softened(student_logits, teacher_logits, temperature, counts)
    plain_s, plain_t = softened(student_logits, teacher_logits, 1.0, counts)
    target = -at_label(plain_t, labels).exp() * at_label(plain_s, labels)
    others_s, others_t = log_probs_of_others(log_s, labels), log_probs_of_others(log_t, labels)
    non_target = -(others_t.exp() * others_s).sum(-1)
    return reduce(target + non_target_weight * temperature**2 * non_target, counts, reduction)


class NKDLoss(LogitTerm):
    """Normalized distillation; see `nkd` for the formula. Reads `labels`.

    Args:
        temperature: As for `LogitTerm`; of the non-target part.
        non_target_weight: gamma, the weight of the non-target part.
        classes: As for `LogitTerm`.
    """

    averages: Averages = "labels"

    def __init__(
        self,
        temperature: Scheduled = 1.0,
        non_target_weight: float = 1.5,
        classes: int | None = None,
    ) -> None:
        super().__init__(temperature, classes)
        self.non_target_weight = non_target_weight

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return both parts' weighted sum, averaged over what has a label."""
        return nkd(student, teacher, batch["labels"], self.now(self.temperature), self.non_target_weight, mask)
