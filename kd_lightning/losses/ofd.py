"""Overhauled feature distillation: features from before the ReLU, up to what the ReLU removes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_lightning.losses.projectors import projector, same_size
from kd_lightning.losses.term import Reduction, Term, check_same_shape, in_float32, reduce
from kd_lightning.types import Batch, ModelOutput


@in_float32
def ofd(student_feature: Tensor, teacher_feature: Tensor, margin: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""Partial L2 distance to the teacher's margin-ReLU feature (Heo et al. 2019, arXiv 1904.01866).

    .. math:: \frac{1}{CHW} \sum_i \begin{cases} 0 & s_i \le \hat t_i \le 0 \\ (s_i - \hat t_i)^2 & \text{otherwise}
              \end{cases}, \qquad \hat t_i = \max(t_i, m_c)

    averaged over examples, with a margin m_c <= 0 for each channel. Where the teacher's ReLU closes it is enough that
    the student's does, far enough. The paper sums over entries; here the value does not grow with the map. The
    teacher's feature gets no gradient.

    Args:
        student_feature: s, from before the ReLU, `(B, C, H, W)` (or `(B, C)`), projected to the teacher's channels.
        teacher_feature: t, the same shape, from before the ReLU.
        margin: m, `(C,)`; see `batchnorm_margin` and `response_margin`.
        reduction: `mean` over examples, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[-5.0, 0.0, 3.0]]), torch.tensor([[-2.0, -2.0, 1.0]])
        >>> round(ofd(s, t, torch.tensor([-1.0, -1.0, -1.0])).item(), 4)  # (0 + 1 + 4) / 3
        1.6667
    """
    check_same_shape(student_feature, teacher_feature, "feature")
    if student_feature.ndim < 2 or margin.shape != student_feature.shape[1:2]:
        raise ValueError(
            f"margin {tuple(margin.shape)} must have one entry for each channel of a feature "
            f"{tuple(student_feature.shape)}, (B, C, ...)"
        )
    target = torch.maximum(teacher_feature.detach(), margin.view(-1, *[1] * (student_feature.ndim - 2)))
    right = (student_feature <= target) & (target <= 0)
    values = (student_feature - target).square().masked_fill(right, 0.0)
    return reduce(values.flatten(1).mean(1), None, reduction)


def batchnorm_margin(batchnorm: nn.Module) -> Tensor:
    r"""Return each channel's mean negative response `(C,)`, from a BatchNorm's scale and shift.

    .. math:: m = E[x \mid x < 0] = \beta - \sigma \frac{\varphi(\beta / \sigma)}{\Phi(-\beta / \sigma)}, \quad
              x \sim N(\beta, \sigma^2), \ \sigma = |\gamma|

    Raises:
        ValueError: Not a BatchNorm with scale and shift.

    >>> batchnorm_margin(nn.BatchNorm2d(1)).item()  # scale 1, shift 0: -sqrt(2 / pi)
    -0.7978845834732056
    """
    if not isinstance(batchnorm, nn.modules.batchnorm._BatchNorm) or not batchnorm.affine:
        raise ValueError(f"{type(batchnorm).__name__} is no BatchNorm with a scale and a shift")
    shift, scale = batchnorm.bias.detach().double(), batchnorm.weight.detach().double().abs()
    # From 30 standard deviations above zero on, nothing is negative; below that the ratio keeps 12 digits.
    z = (shift / scale.clamp(min=1e-12)).clamp(max=30.0)
    log_density = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    ratio = (log_density - torch.special.log_ndtr(-z)).exp()
    return torch.where(z < 30.0, scale.clamp(min=1e-12) * (z - ratio), 0.0).to(batchnorm.weight.dtype)


def response_margin(feature: Tensor) -> Tensor:
    """Return each channel's mean negative response `(C,)` in a feature `(B, C, ...)`; 0 without one.

    >>> response_margin(torch.tensor([[-1.0, 2.0], [-3.0, 4.0], [5.0, 6.0]])).tolist()
    [-2.0, 0.0]
    """
    by_channel = feature.detach().transpose(0, 1).flatten(1)
    return by_channel.clamp(max=0).sum(1) / (by_channel < 0).sum(1).clamp(min=1)


class OFDLoss(Term):
    """Overhauled feature distillation of pairs of features, summed; see `ofd` for the formula.

    The teacher's features must be read before a ReLU: `preactivations[i]` of `CNN` and `ResNet`. The name of a
    BatchNorm is one only where the ReLU that follows does not work in place, which would overwrite its output.
    Each student feature is projected by a 1 x 1 convolution and a BatchNorm, which may put out negative values even
    where its own feature comes after a ReLU.

    Args:
        student_features: Names of the student's maps; see `kd_lightning.models.features`.
        teacher_features: Names of the teacher's, one for each.
        batchnorms: The teacher's BatchNorms that put these out, for margins as in the paper. None: the margins are the
            mean negative responses in the batch that `connect` is shown, which is what the paper estimates.

    Raises:
        ValueError: Not as many of one as of the other; or, in `connect`, a teacher's feature without a negative entry.
    """

    def __init__(
        self,
        student_features: Sequence[str] = ("feature_maps[-1]",),
        teacher_features: Sequence[str] = ("feature_maps[-1]",),
        batchnorms: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        counts = len(student_features), len(teacher_features), len(batchnorms or teacher_features)
        if len(set(counts)) > 1 or not student_features:
            raise ValueError(f"student_features, teacher_features and batchnorms go together, but there are {counts}")
        self.needs_student, self.needs_teacher = tuple(student_features), tuple(teacher_features)
        self.margins = None if batchnorms is None else [batchnorm_margin(one) for one in batchnorms]
        self.projectors = nn.ModuleList()

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projectors and compute the margins.

        Raises:
            ValueError: A teacher's feature that has no negative entry: it was read after a ReLU.
        """
        for i, (name_s, name_t) in enumerate(zip(self.needs_student, self.needs_teacher, strict=True)):
            of_student, of_teacher = student.features[name_s], teacher.features[name_t]
            if not (of_teacher < 0).any():
                raise ValueError(
                    f"the teacher's {name_t} has no negative entry, as after a ReLU (in place, it overwrites what it "
                    "reads): give maps from before the ReLU; of CNN and ResNet they are preactivations[i]"
                )
            self.projectors.append(projector("conv1x1", of_student, of_teacher, name_s))
            margin = response_margin(of_teacher) if self.margins is None else self.margins[i].to(of_teacher.device)
            self.register_buffer(f"margin_{i}", margin)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the sum over the pairs."""
        if not self.projectors:
            raise ValueError("OFDLoss: the projectors are not built; call Objective.connect first")
        total = student.logits.new_zeros(())
        for i, project in enumerate(self.projectors):
            of_student, of_teacher = student.features[self.needs_student[i]], teacher.features[self.needs_teacher[i]]
            total = total + ofd(*same_size(project(of_student), of_teacher), self.get_buffer(f"margin_{i}"))
        return total
