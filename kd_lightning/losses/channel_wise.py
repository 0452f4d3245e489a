"""Channel-wise distillation: in each channel the student is active where the teacher is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.feature_pair import FeaturePairTerm
from kd_lightning.losses.projectors import Projection
from kd_lightning.losses.relations import counting_examples
from kd_lightning.losses.term import (
    Averages,
    Reduction,
    Scheduled,
    check_mask,
    check_positive,
    check_same_shape,
    in_float32,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def channel_wise(
    student_feature: Tensor,
    teacher_feature: Tensor,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL of channels' distributions over positions (Shu et al. 2020, arXiv 2011.13256), in nats.

    .. math:: \frac{T^2}{C} \sum_c \mathrm{KL}\left(\phi(t_c) \,\|\, \phi(s_c)\right), \quad
              \phi(x)_i = \frac{\exp(x_i / T)}{\sum_j \exp(x_j / T)}

    where i and j go over the places of a map or the tokens that count; averaged over examples. What a channel adds to
    all its positions alike does not matter. The teacher's feature gets no gradient.

    Args:
        student_feature: s: a map `(B, C, H, W)`, or tokens `(B, L, C)`.
        teacher_feature: t: the same shape.
        temperature: T > 0; the larger, the more of the positions count.
        mask: `(B, L)` bool for tokens, True = counts.
        reduction: `mean` over the examples with anything that counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Shapes that differ or have no positions, a mask for a map, or a temperature that is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[0.0], [0.0]]]), torch.tensor([[[1.0], [0.0]]])
        >>> round(channel_wise(student, teacher, temperature=1.0).item(), 4)
        0.1109
    """
    check_same_shape(student_feature, teacher_feature, "feature")
    check_positive("temperature", temperature)
    pair = student_feature / temperature, teacher_feature.detach() / temperature
    log_probs_s, log_probs_t = (F.log_softmax(_positions(feature, mask), 2) for feature in pair)
    divergence = F.kl_div(log_probs_s, log_probs_t, reduction="none", log_target=True)
    if mask is not None:
        divergence = divergence.masked_fill(~mask.unsqueeze(1), 0.0)
    return temperature**2 * reduce(divergence.sum(2).mean(1), counting_examples(mask), reduction)


def _positions(feature: Tensor, mask: Tensor | None) -> Tensor:
    """Return `(B, C, P)`, very negative at masked positions, so that their probability is zero."""
    if feature.ndim == 4 and mask is None:
        return feature.flatten(2)
    if feature.ndim != 3:
        raise ValueError(
            f"feature {tuple(feature.shape)}: expected a map (B, C, H, W) without a mask, or tokens (B, L, C)"
        )
    check_mask(mask, feature.shape[:2])
    if mask is not None:  # finite, so that a row of padding alone has a softmax
        feature = feature.masked_fill(~mask.unsqueeze(2), torch.finfo(feature.dtype).min / 2)
    return feature.transpose(1, 2)


class ChannelWiseLoss(FeaturePairTerm):
    """Channel-wise distillation of one feature of each network; see `channel_wise` for the formula.

    Args:
        student_feature: Name of the student's feature, a map or tokens; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's, of the same kind.
        projector: Takes the student's channels to the teacher's.
        temperature: T > 0, or a schedule over training progress; the paper's is 4.
    """

    averages: Averages = "sequences"

    def __init__(
        self,
        student_feature: str = "feature_maps[-1]",
        teacher_feature: str = "feature_maps[-1]",
        projector: Projection | nn.Module = "linear",
        temperature: Scheduled = 4.0,
    ) -> None:
        super().__init__(student_feature, teacher_feature, projector)
        self.temperature = temperature

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return T^2 KL(teacher || student) over positions, averaged over channels and examples."""
        of_student, of_teacher, mask = self.pair(student, teacher, batch)
        return channel_wise(of_student, of_teacher, self.now(self.temperature), mask)
