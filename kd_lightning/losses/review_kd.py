"""Knowledge review: the student's stages, fused with its deeper ones, match the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.projectors import same_size
from kd_lightning.losses.term import Depth, Reduction, Term, check_same_shape, in_float32, reduce
from kd_lightning.types import Batch, ModelOutput

_PYRAMID = (4, 2, 1)


@in_float32
def review_kd(student_map: Tensor, teacher_map: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""Squared differences of maps at several resolutions (Chen et al. 2021, arXiv 2104.09044).

    .. math:: \frac{\sum_k 2^{-k} \, \mathrm{MSE}(\phi_k(s), \phi_k(t))}{\sum_k 2^{-k}}

    averaged over examples. phi_0 is the map itself; phi_1, phi_2, ... average pool it to 4 x 4, 2 x 2 and 1 x 1, those
    of them that are smaller than the map. Halving weights and their normalisation are those of the authors' program:
    the paper leaves them open. The teacher's map gets no gradient.

    Args:
        student_map: s, `(B, C, H, W)`, with the teacher's channels; of maps of different sizes the larger is average
            pooled first.
        teacher_map: t, `(B, C, H', W')`.
        reduction: `mean` over examples, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Not two maps, or maps of other channels.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
        >>> round(review_kd(student, torch.zeros(1, 1, 2, 2)).item(), 4)  # (1 + 1/2 * 0) / (1 + 1/2)
        0.6667
    """
    if student_map.ndim != 4 or teacher_map.ndim != 4:
        raise ValueError(
            f"student map {tuple(student_map.shape)} and teacher map {tuple(teacher_map.shape)} must be (B, C, H, W)"
        )
    student, teacher = same_size(student_map, teacher_map.detach())
    check_same_shape(student, teacher, "map")
    smallest = min(student.shape[2:])
    pyramid = [student - teacher]
    pyramid += [F.adaptive_avg_pool2d(pyramid[0], size) for size in _PYRAMID if size < smallest]
    values = torch.stack([0.5**k * difference.square().mean((1, 2, 3)) for k, difference in enumerate(pyramid)])
    return reduce(values.sum(0) / (2 - 0.5 ** (len(pyramid) - 1)), None, reduction)


class AttentionFusion(nn.Module):
    """One step of the review: fuses a stage of the student with the deeper ones.

    Args:
        channels: Of the student's stage.
        width: Channels passed from stage to stage.
        target: Channels of the teacher's stage.
        deepest: Whether there is no deeper stage.
    """

    def __init__(self, channels: int, width: int, target: int, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.leave = nn.Sequential(nn.Conv2d(width, target, 3, padding=1, bias=False), nn.BatchNorm2d(target))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())

    def forward(self, stage: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map for the teacher's stage, and the one for the next shallower stage."""
        fused: Tensor = self.enter(stage)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, size=fused.shape[2:], mode="nearest")
            own, others = self.attend(torch.cat([fused, deeper], 1)).split(1, dim=1)
            fused = own * fused + others * deeper
        return self.leave(fused), fused


class ReviewKDLoss(Term):
    """Knowledge review over the stages of two CNNs, summed over stages; see `review_kd` for the formula.

    Stages are paired from the last to the first, as far as both networks have them: so the student's
    shallow stages, together with its deep ones, learn from the teacher's shallow stages. The teacher's maps and the
    student's may differ in channels and size. The paper raises this loss's weight over the first epochs; for that give
    the weight a schedule (`kd_lightning.schedules.Linear`).

    Args:
        width: Channels passed from stage to stage.

    Raises:
        ValueError: A width below 1.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.width = width
        self.fusions = nn.ModuleList()

    def plan(self, student: Depth, teacher: Depth) -> None:
        """Pair the stages from the last to the first."""
        stages = min(student("feature_maps"), teacher("feature_maps"))
        self.needs_student = self.needs_teacher = tuple(f"feature_maps[{-i}]" for i in range(1, stages + 1))

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the fusions, from the deepest stage on."""
        for i, name in enumerate(self.needs_student):
            channels, target = student.features[name].shape[1], teacher.features[name].shape[1]
            self.fusions.append(AttentionFusion(channels, self.width, target, deepest=i == 0))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the sum over the stages."""
        if not self.fusions:
            raise ValueError("ReviewKDLoss: nothing is built yet; call Objective.plan and Objective.connect first")
        total, passed = student.logits.new_zeros(()), None
        for name, fusion in zip(self.needs_student, self.fusions, strict=True):
            compared, passed = fusion(student.features[name], passed)
            total = total + review_kd(compared, teacher.features[name])
        return total
