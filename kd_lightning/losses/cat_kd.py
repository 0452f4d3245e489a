"""Class attention transfer: both networks detect each class at the same places."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.relations import unit
from kd_lightning.losses.term import Reduction, Term, check_same_shape, in_float32, reduce
from kd_lightning.types import Batch, ModelOutput


@in_float32
def cat_kd(student_maps: Tensor, teacher_maps: Tensor, size: int = 2, reduction: Reduction = "mean") -> Tensor:
    r"""Squared distance of normalised class activation maps (Guo et al. 2023, CAT-KD, CVPR).

    .. math:: \frac{1}{C} \sum_c \left\| \frac{\phi(A^s_c)}{\|\phi(A^s_c)\|_2} - \frac{\phi(A^t_c)}{\|\phi(A^t_c)\|_2}
              \right\|_2^2, \quad A_c(u) = \sum_d W_{cd} F_d(u)

    averaged over examples. A is the classifier W applied to the last feature map at each place u, without its bias, and
    phi average pools it to `size` x `size`. A value is in [0, 4], unchanged when a class's map is scaled on either
    side. A map that is zero everywhere stays zero. The teacher's maps get no gradient.

    Args:
        student_maps: A^s, `(B, C, H, W)`, a map for each class; H and W may differ from the teacher's.
        teacher_maps: A^t, `(B, C, H', W')`.
        size: Height and width that the maps are pooled to. At 1 only signs would be left.
        reduction: `mean` over examples, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Not two batches of maps of the same classes, or a size below 2.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0], [0.0, 0.0]]]])
        >>> cat_kd(student, teacher).item()
        2.0
    """
    if student_maps.ndim != 4 or teacher_maps.ndim != 4:
        raise ValueError(
            f"student maps {tuple(student_maps.shape)} and teacher maps {tuple(teacher_maps.shape)} must be "
            "(B, C, H, W), a map for each class"
        )
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    student, teacher = (F.adaptive_avg_pool2d(maps, size).flatten(2) for maps in (student_maps, teacher_maps.detach()))
    check_same_shape(student, teacher, "pooled class maps")
    return reduce((unit(student) - unit(teacher)).square().sum(2).mean(1), None, reduction)


class CATKDLoss(Term):
    """Class attention transfer between the networks' class activation maps; see `cat_kd` for the formula.

    The feature `cam` is the network's classifier applied at each place of its last feature map. It exists where the
    classifier reads the mean of that map; a network that gives such maps of its own may be read by a module's name.

    Args:
        student_feature: Name of the student's class activation maps; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's.
        size: Height and width that the maps are pooled to.
    """

    def __init__(self, student_feature: str = "cam", teacher_feature: str = "cam", size: int = 2) -> None:
        super().__init__()
        self.needs_student, self.needs_teacher, self.size = (student_feature,), (teacher_feature,), size

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the squared distance of the class activation maps, averaged over classes and examples."""
        return cat_kd(student.features[self.needs_student[0]], teacher.features[self.needs_teacher[0]], self.size)
