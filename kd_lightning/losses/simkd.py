"""SimKD: learn the input of the teacher's classifier, and predict with that classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import Reduction, Term, check_mask, check_same_shape, in_float32, only_counted, reduce
from kd_lightning.types import Batch, ModelOutput


@in_float32
def simkd(
    student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mean squared difference of classifier inputs (Chen et al. 2022, arXiv 2203.14001, equation 2).

    .. math:: \frac{1}{D} \sum_d (P(s)_d - t_d)^2

    averaged over the examples that count. Where it is zero the student predicts what the teacher does, since it has its
    classifier. The paper compares the maps before the last pooling and sums; the pooled vectors compared here exist in
    every classifier, and the classifier reads nothing else of the maps. The teacher's feature gets no gradient.

    Args:
        student_feature: P(s), the student's feature, projected to the teacher's width: `(B, D)`.
        teacher_feature: t, the same shape.
        mask: `(B,)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> simkd(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])).item()
        2.5
    """
    check_same_shape(student_feature, teacher_feature, "feature")
    check_mask(mask, student_feature.shape[:-1])
    student, teacher = only_counted(student_feature, mask), only_counted(teacher_feature.detach(), mask)
    return reduce(F.mse_loss(student, teacher, reduction="none").mean(-1), mask, reduction)


class SimKDLoss(Term):
    """Regresses the input of the teacher's classifier; see `simkd` for the formula.

    The projection P is part of the student, which needs it to predict: `kd_lightning.models.simkd.SimKDStudent`
    (`model@student=simkd`, or `simkd_cnn`) is any network with a projector and the teacher's classifier on top. Other
    students have no `simkd_projector` and are refused, since this loss would leave their own classifier untrained.
    """

    needs_student = ("simkd_projector",)
    needs_teacher = ("pooled",)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean squared difference, averaged over examples."""
        return simkd(student.features["simkd_projector"], teacher.features["pooled"])
