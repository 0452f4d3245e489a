"""Variational information distillation: predict the teacher's feature with a learned variance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.feature_pair import FeaturePairTerm
from kd_lightning.losses.projectors import Projection
from kd_lightning.losses.term import (
    Reduction,
    check_mask,
    check_positive,
    check_same_shape,
    in_float32,
    only_counted,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def vid(
    student_mean: Tensor,
    teacher_feature: Tensor,
    variance: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Negative log-likelihood of a feature, in nats per entry (Ahn et al. 2019, arXiv 1904.05835).

    .. math:: \frac{1}{D} \sum_d \frac{1}{2} \left( \log \sigma_d^2 + \frac{(t_d - \mu_d)^2}{\sigma_d^2} \right)

    up to the constant log(2 pi) / 2, averaged over the examples (or positions) that count; of a map an example's value
    is the mean over places. It bounds the mutual information of the two features from below, so it has no zero: at best
    it is half the mean log variance, plus 1/2. The paper sums over entries (equation 5); here the value does not grow
    with the feature's size. The student's mean and the variance get a gradient, the teacher's feature none.

    Args:
        student_mean: mu, what the student predicts: vectors `(B, D)`, tokens `(B, L, D)` or a map `(B, D, H, W)`.
        teacher_feature: t, the same shape.
        variance: sigma^2 of each channel, `(D,)`, positive.
        mask: `(B,)`, for tokens `(B, L)`, bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (token).

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> vid(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(2)).item()
        1.25
    """
    check_same_shape(student_mean, teacher_feature, "feature")
    is_map = student_mean.ndim == 4
    channels = 1 if is_map else -1
    width = student_mean.shape[channels]
    if variance.shape != (width,):
        raise ValueError(f"variance {tuple(variance.shape)} must have one entry for each of {width} channels")
    check_mask(mask, student_mean.shape[:1] if is_map else student_mean.shape[:-1])
    variance = variance.view(-1, 1, 1) if is_map else variance
    difference = only_counted(teacher_feature.detach(), mask) - only_counted(student_mean, mask)
    values = 0.5 * (variance.log() + difference.square() / variance)
    values = values.mean((1, 2, 3) if is_map else -1)
    return reduce(values, mask, reduction)


class VIDLoss(FeaturePairTerm):
    """Variational information distillation from one feature of each network; see `vid` for the formula.

    Each channel's variance is learned, as softplus of a parameter plus a floor, and trained with the student. Like
    every log-likelihood of a density the value may become negative.

    Args:
        student_feature: Name of the student's feature; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's, of the same kind: vectors, tokens or maps.
        projector: The regressor from the student's feature to the teacher's mean.
        variance: Of every channel at first; the paper's program begins with 5.
        floor: Least variance, so that a channel that is met exactly does not drown the others.

    Raises:
        ValueError: A variance that is not above a positive floor.
    """

    raw_variance: nn.Parameter

    def __init__(
        self,
        student_feature: str = "pooled",
        teacher_feature: str = "pooled",
        projector: Projection | nn.Module = "mlp",
        variance: float = 5.0,
        floor: float = 1e-3,
    ) -> None:
        super().__init__(student_feature, teacher_feature, projector)
        check_positive("floor", floor)
        if not variance > floor:
            raise ValueError(f"variance={variance} must be above floor={floor}")
        self.initial, self.floor = variance, floor

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the regressor and the variances."""
        super().connect(student, teacher, examples)
        of_teacher = self.features(student, teacher)[1]
        width = of_teacher.shape[1 if of_teacher.ndim == 4 else -1]
        above = self.initial - self.floor
        raw = above + math.log(-math.expm1(-above))  # softplus(raw) = above
        self.raw_variance = nn.Parameter(torch.full((width,), raw, device=of_teacher.device))

    @property
    def variance(self) -> Tensor:
        """Each channel's variance, `(D,)`."""
        return F.softplus(self.raw_variance) + self.floor

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the negative log-likelihood per entry, averaged over examples or real tokens."""
        of_student, of_teacher, mask = self.pair(student, teacher, batch)
        return vid(of_student, of_teacher, self.variance, mask)
