"""Hints: the student's intermediate feature regresses the teacher's."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.layers import Kind, LayerMap, LayerwiseTerm
from kd_lightning.losses.projectors import Projection, projector, same_size
from kd_lightning.losses.relations import unit
from kd_lightning.losses.term import (
    Averages,
    Reduction,
    Term,
    check_mask,
    check_same_shape,
    in_float32,
    only_counted,
    reduce,
    token_mask,
)
from kd_lightning.types import Batch, ModelOutput

Distance = Literal["mse", "cosine", "smooth_l1"]


@in_float32
def hint(
    student_feature: Tensor,
    teacher_feature: Tensor,
    distance: Distance = "mse",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance of features of one width (Romero et al. 2014, FitNets, arXiv 1412.6550, equation 3).

    .. math:: \mathrm{mse}: \frac{1}{D} \sum_d (s_d - t_d)^2 \qquad
              \mathrm{smooth\_l1}: \frac{1}{D} \sum_d h(s_d - t_d) \qquad
              \mathrm{cosine}: 1 - \frac{s \cdot t}{\|s\| \|t\|}

    with h(x) = x^2 / 2 for |x| < 1, else |x| - 1/2, averaged over the examples (or positions) that count. Of maps the
    channels are compared at each place, after average pooling to the smaller map, and an example's value is the mean
    over places. The paper has half the squared distance, summed: here the value does not grow with the width or the
    size of the map. A zero vector has the cosine 0 and gets no gradient from it. The teacher's feature gets none.

    Args:
        student_feature: s: vectors `(B, D)`, tokens `(B, L, D)` or a map `(B, D, H, W)`, projected to the teacher's
            width.
        teacher_feature: t: the same shape; a map may have another height and width.
        distance: `mse`, `cosine` or `smooth_l1`.
        mask: `(B,)`, for tokens `(B, L)`, bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (token).

    Raises:
        ValueError: Shapes that differ, or an unknown distance.

    Example:
        >>> import torch
        >>> hint(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])).item()
        2.5
    """
    if distance not in get_args(Distance):
        raise ValueError(f"distance={distance!r}: expected one of {', '.join(get_args(Distance))}")
    student, teacher = same_size(student_feature, teacher_feature.detach())
    check_same_shape(student, teacher, "feature")
    is_map = student.ndim == 4
    check_mask(mask, student.shape[:1] if is_map else student.shape[:-1])
    student, teacher = only_counted(student, mask), only_counted(teacher, mask)
    if is_map:
        student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
    if distance == "cosine":
        values = 1 - (unit(student) * unit(teacher)).sum(-1)
    else:
        entries = F.mse_loss if distance == "mse" else F.smooth_l1_loss
        values = entries(student, teacher, reduction="none").mean(-1)
    if is_map:
        values = values.mean((1, 2))
    return reduce(values, mask, reduction)


class HintLoss(Term):
    """One hint: a feature of the student, projected, and one of the teacher; see `hint` for the formula.

    The paper trains the lower half of the student by the hint first and then the whole by soft targets; here the hint
    is a term beside the others, in one training.

    Args:
        student_feature: Name of the student's feature; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's, of the same kind: vectors, tokens or maps.
        projector: Takes the student's feature to the teacher's width; trained with the student.
        distance: `mse`, `cosine` or `smooth_l1`.
    """

    averages: Averages = "tokens"
    projector: Projection | nn.Module

    def __init__(
        self,
        student_feature: str = "pooled",
        teacher_feature: str = "pooled",
        projector: Projection | nn.Module = "linear",
        distance: Distance = "mse",
    ) -> None:
        super().__init__()
        self.needs_student, self.needs_teacher = (student_feature,), (teacher_feature,)
        self.projector, self.distance = projector, distance

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projector.

        Raises:
            ValueError: As `kd_lightning.losses.projectors.projector`.
        """
        of_student, of_teacher = self._features(student, teacher)
        self.projector = projector(self.projector, of_student, of_teacher, self.needs_student[0])
        if of_student.ndim != 3:
            self.averages = "examples"

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the distance, averaged over examples or real tokens."""
        if isinstance(self.projector, str):
            raise ValueError("HintLoss: the projector is not built; call Objective.connect first")
        of_student, of_teacher = self._features(student, teacher)
        mask = token_mask(batch, of_student, of_teacher)
        return hint(self.projector(only_counted(of_student, mask)), of_teacher, self.distance, mask)

    def _features(self, student: ModelOutput, teacher: ModelOutput) -> tuple[Tensor, Tensor]:
        return student.features[self.needs_student[0]], teacher.features[self.needs_teacher[0]]


class LayerHintLoss(LayerwiseTerm):
    """A hint for each of the student's layers, averaged; see `hint` for the formula.

    Args:
        kind: `hidden` (transformers) or `feature_maps` (CNNs).
        layers: Which layer learns from which; see `LayerMap`.
        projector: As for `HintLoss`, one for each student layer.
        distance: `mse`, `cosine` or `smooth_l1`.
    """

    def __init__(
        self,
        kind: Kind = "hidden",
        layers: LayerMap = "uniform",
        projector: Projection = "linear",
        distance: Distance = "mse",
    ) -> None:
        super().__init__(layers, projector)
        self.kind, self.distance = kind, distance

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the distance, averaged over examples or real tokens."""
        return hint(student, teacher, self.distance, mask)
