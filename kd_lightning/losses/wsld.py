"""Weighted soft labels: less where the student is already better than the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, at_label, kl, labelled, softened
from kd_lightning.losses.term import Averages, Reduction, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def wsld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Soft targets weighted example by example (Zhou et al. 2021, arXiv 2102.00650), in nats.

    .. math:: w \, T^2 \, \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)), \quad
              w = 1 - \exp\left( - \frac{-\log \mathrm{softmax}(z_s)_y}{-\log \mathrm{softmax}(z_t)_y} \right)

    The weight, in [0, 1], is small where the student's cross-entropy with the label is small beside the teacher's:
    there soft targets add more bias than they take away variance. It gets no gradient, nor do the teacher's logits. The
    paper multiplies the soft cross-entropy; the KL divergence has the same gradient, and is 0 where both sides agree.
    Examples *without a label* (-100) do not count.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite, C >= 2.
        teacher_logits: The same shape, finite.
        labels: `(B,)` or `(B, L)` int64; -100 does not count.
        temperature: T > 0 of the soft targets; larger is softer. The weight is always at temperature 1.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, fewer than two classes, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> round(wsld(student, teacher, torch.tensor([0])).item(), 6)  # (1 - e^-2) times 0.143841
        0.124374
    """
    labels, counts = labelled(labels, student_logits, mask)
    log_s, log_t = softened(student_logits, teacher_logits, temperature, counts)
    with torch.no_grad():
        ce_s, ce_t = (-at_label(z, labels) for z in softened(student_logits, teacher_logits, 1.0, counts))
        weight = 1 - torch.exp(-ce_s / ce_t.clamp(min=torch.finfo(ce_t.dtype).tiny))
    return temperature**2 * reduce(weight * kl(log_t, log_s), counts, reduction)


class WSLDLoss(LogitTerm):
    """Weighted soft labels; see `wsld` for the formula, `LogitTerm` for the arguments. Reads `labels`."""

    averages: Averages = "labels"

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T^2 times the weighted KL divergence, averaged over what has a label."""
        return wsld(student, teacher, batch["labels"], self.now(self.temperature), mask)
