"""MobileBERT's two layerwise losses: feature maps (hidden states) and attentions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.attentions import attention_kl
from kd_lightning.losses.layers import Kind, LayerMap, LayerwiseTerm
from kd_lightning.losses.projectors import Projection
from kd_lightning.losses.term import Reduction, check_mask, check_same_shape, in_float32, only_counted, reduce

EPS = 1e-5
"""Added to variances, as in a layer normalisation."""


@in_float32
def mobilebert_feature_map(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    decomposed: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Feature map transfer (Sun et al. 2020, arXiv 2004.02984).

    .. math:: \frac{1}{D} \| h_s - h_t \|_2^2

    averaged over the positions that count. Decomposed, it is the discrepancy of the normalised maps
    :math:`n = (h - \mu) / \sigma` plus that of their statistics, each position's mean and standard deviation:

    .. math:: \frac{1}{D} \| n_s - n_t \|_2^2 + (\mu_s - \mu_t)^2 + (\sigma_s - \sigma_t)^2

    The paper names this decomposition, which steadies training, without a formula. This one is exact up to the scale
    of the first part: times :math:`\sigma_s \sigma_t` it makes up the plain value.

    Args:
        student_hidden: One layer's states, `(B, L, D)`.
        teacher_hidden: The same shape; gets no gradient.
        decomposed: Which of the two.
        mask: `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value a position.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[4.0, -2.0]]])
        >>> mobilebert_feature_map(student, teacher).item()
        5.0
        >>> f"{mobilebert_feature_map(student, teacher, decomposed=True).item():.4f}"  # 0 + 1 + 4
        '5.0000'
    """
    check_same_shape(student_hidden, teacher_hidden, "hidden states")
    check_mask(mask, student_hidden.shape[:-1])
    student_hidden, teacher_hidden = only_counted(student_hidden, mask), only_counted(teacher_hidden.detach(), mask)
    statistics: Tensor | float = 0.0
    if decomposed:
        student_hidden, student_mean, student_deviation = _standardised(student_hidden)
        teacher_hidden, teacher_mean, teacher_deviation = _standardised(teacher_hidden)
        statistics = (student_mean - teacher_mean).square() + (student_deviation - teacher_deviation).square()
    values = F.mse_loss(student_hidden, teacher_hidden, reduction="none").mean(-1) + statistics
    return reduce(values, mask, reduction)


def _standardised(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each position's normalised state, its mean and its standard deviation."""
    mean = hidden.mean(-1)
    deviation = (hidden.var(-1, correction=0) + EPS).sqrt()
    return (hidden - mean.unsqueeze(-1)) / deviation.unsqueeze(-1), mean, deviation


@in_float32
def mobilebert_attention(
    student_attention: Tensor, teacher_attention: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Attention transfer (Sun et al. 2020, arXiv 2004.02984), in nats.

    .. math:: \frac{1}{H} \sum_h \mathrm{KL}(a_{t,h} \| a_{s,h})

    for each query, averaged over those that count. Padding keys have probability 0 on both sides. Probabilities below
    1e-12 count as 1e-12 in the logarithm.

    Args:
        student_attention: `(B, H, L, L)`, rows sum to 1.
        teacher_attention: The same shape; gets no gradient.
        mask: `(B, L)` bool, True = counts, as a query and as a key.
        reduction: `mean` over what counts, `sum`, or `none` for one value a query, `(B, L)`.

    Raises:
        ValueError: Numbers of heads or shapes that differ.

    Example:
        >>> import torch
        >>> half = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]])
        >>> f"{mobilebert_attention(half, torch.eye(2).view(1, 1, 2, 2)).item():.4f}"  # log 2
        '0.6931'
    """
    return attention_kl(student_attention, teacher_attention, mask, reduction)


class MobileBERTFeatureMapLoss(LayerwiseTerm):
    """Feature map transfer layer by layer; see `mobilebert_feature_map` for the formula.

    The paper's student is as deep and, between its bottlenecks, as wide as its teacher; others take a layer map and a
    projector. It trains layer after layer; this is the mean over the pairs of layers, in one stage.

    Args:
        layers: See `LayerMap`.
        projector: As for `LayerwiseTerm`; `none` is the paper's.
        decomposed: Normalised maps and their statistics apart.
    """

    def __init__(
        self, layers: LayerMap = "uniform", projector: Projection | nn.Module = "none", decomposed: bool = False
    ) -> None:
        super().__init__(layers, projector)
        self.decomposed = decomposed

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the discrepancy over the positions that count."""
        return mobilebert_feature_map(student, teacher, self.decomposed, mask)


class MobileBERTAttentionLoss(LayerwiseTerm):
    """Attention transfer layer by layer; see `mobilebert_attention` for the formula.

    Args:
        layers: See `LayerMap`.
    """

    kind: Kind = "attention"

    def __init__(self, layers: LayerMap = "uniform") -> None:
        super().__init__(layers)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the divergence over the queries that count."""
        return mobilebert_attention(student, teacher, mask)
