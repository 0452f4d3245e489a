"""Masked generative distillation: reconstruct the teacher's feature from the student's masked one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kd_lightning.losses.feature_pair import FeaturePairTerm
from kd_lightning.losses.projectors import Projection
from kd_lightning.losses.term import Reduction, check_mask, check_same_shape, in_float32, only_counted, reduce
from kd_lightning.types import Batch, ModelOutput


@in_float32
def mgd(
    student_feature: Tensor,
    teacher_feature: Tensor,
    kept: Tensor,
    generate: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared error of features generated from masked ones (Yang et al. 2022, arXiv 2205.01529).

    .. math:: \frac{1}{D} \sum_d \left( t_d - G(s \cdot M)_d \right)^2

    averaged over the examples (or positions) that count; of a map an example's value is the mean over places. M is 0
    where the student's feature is masked and 1 elsewhere, and G a small network that is trained along. The paper sums
    over entries; here the value does not grow with the feature's size. The teacher's feature gets no gradient.

    Args:
        student_feature: s, projected to the teacher's width: `(B, D)`, tokens `(B, L, D)` or a map `(B, D, H, W)`.
        teacher_feature: t, the same shape.
        kept: M, bool, of a shape that broadcasts to the feature's: `(B, 1, H, W)` masks places.
        generate: G, from the feature's shape to the same.
        mask: `(B,)`, for tokens `(B, L)`, bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (token).

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> s, t, kept = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[True, False]])
        >>> mgd(s, t, kept, lambda x: 2 * x).item()
        2.5
    """
    check_same_shape(student_feature, teacher_feature, "feature")
    is_map = student_feature.ndim == 4
    check_mask(mask, student_feature.shape[:1] if is_map else student_feature.shape[:-1])
    generated = generate(only_counted(student_feature, mask).masked_fill(~kept, 0.0))
    check_same_shape(generated, teacher_feature, "generated feature")
    values = (generated - only_counted(teacher_feature.detach(), mask)).square()
    values = values.mean((1, 2, 3) if is_map else -1)
    return reduce(values, mask, reduction)


class MGDLoss(FeaturePairTerm):
    """Masked generative distillation of one feature of each network; see `mgd` for the formula.

    Of a map whole places are masked, and a generator of two 3 x 3 convolutions fills them in from their surroundings,
    as in the paper. Vectors and tokens have none: there single entries are masked, and two linear layers fill them in
    from the others. The mask is drawn in every step, from torch's global generator.

    Args:
        student_feature: Name of the student's feature; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's, of the same kind: vectors, tokens or maps.
        projector: Takes the student's feature to the teacher's width.
        ratio: Share of the places (entries) that are masked, in [0, 1); the paper's for classifiers is 0.15.

    Raises:
        ValueError: A ratio outside [0, 1).
    """

    generator: nn.Module

    def __init__(
        self,
        student_feature: str = "feature_maps[-1]",
        teacher_feature: str = "feature_maps[-1]",
        projector: Projection | nn.Module = "linear",
        ratio: float = 0.15,
    ) -> None:
        super().__init__(student_feature, teacher_feature, projector)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio} must be in [0, 1)")
        self.ratio = ratio

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projector and the generator."""
        super().connect(student, teacher, examples)
        of_teacher = self.features(student, teacher)[1]
        self.generator = nn.Sequential(_layer(of_teacher), nn.ReLU(), _layer(of_teacher))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean squared error of what is generated, averaged over examples or tokens."""
        of_student, of_teacher, mask = self.pair(student, teacher, batch)
        drawn = torch.rand_like(of_student[:, :1] if of_student.ndim == 4 else of_student)
        return mgd(of_student, of_teacher, drawn >= self.ratio, self.generator, mask)


def _layer(feature: Tensor) -> nn.Module:
    if feature.ndim == 4:
        return nn.Conv2d(feature.shape[1], feature.shape[1], 3, padding=1)
    return nn.Linear(feature.shape[-1], feature.shape[-1])
