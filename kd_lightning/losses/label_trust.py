"""For noisy labels: a label is weighted by the teacher's confidence in it, soft targets fill the rest."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, at_label, kl, labelled, softened
from kd_lightning.losses.term import Reduction, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def label_trust(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy and soft targets, mixed per example by the teacher's confidence in the label, in nats.

    .. math:: p \, \mathrm{CE}(z_s, y) + (1 - p) \, T^2 \, \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\,
              \mathrm{softmax}(z_s / T)), \quad p = \mathrm{softmax}(z_t)_y

    In place of the cross-entropy of the reference method it makes the weight of the teacher each example's own:
    `alpha + (1 - alpha) (1 - p)`, from alpha where the teacher is certain of the label to 1 where it is certain of
    another class, as of a wrong label. An example *without a label* (-100) has p = 0. The confidence p is always at
    temperature 1, and the teacher's logits get no gradient.

    The form is ours. Weighting the label by the teacher's confidence is the first part of Yang et al. 2023 (arXiv
    2303.13005); a target between a noisy label and a network's prediction is the bootstrapping of Reed et al. 2014
    (arXiv 1412.6596), with one share for all examples. The teacher must not have memorised the labels: use
    `teacher.folds`.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite, C >= 2.
        teacher_logits: The same shape, finite.
        labels: `(B,)` or `(B, L)` int64; -100 is no label.
        temperature: T > 0 of the soft targets; larger is softer.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, fewer than two classes, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> round(label_trust(student, teacher, torch.tensor([0])).item(), 6)  # log(4) / 2 + 0.143841 / 2
        0.765068
    """
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    labels, known = labelled(labels, student_logits, None)
    plain_s, plain_t = softened(student_logits, teacher_logits, 1.0, mask)
    belief = at_label(plain_t, labels).exp() * known
    cross_entropy = -at_label(plain_s, labels)
    return reduce(belief * cross_entropy + (1 - belief) * temperature**2 * kl(log_t, log_s), mask, reduction)


class LabelTrustLoss(LogitTerm):
    """Labels weighted by the teacher's confidence; see `label_trust` for the formula.

    The arguments are those of `LogitTerm`.

    Uses `labels`.
    """

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return the mixture, averaged over the examples or valid positions."""
        return label_trust(student, teacher, batch["labels"], self.now(self.temperature), mask)
