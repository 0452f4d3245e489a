"""Attention transfer: both networks are active at the same places."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.layers import Kind, LayerMap, LayerwiseTerm
from kd_lightning.losses.projectors import same_size
from kd_lightning.losses.relations import SHORTEST, counting_examples, patterns, unit
from kd_lightning.losses.term import (
    Averages,
    Reduction,
    check_mask,
    check_same_shape,
    in_float32,
    only_counted,
    reduce,
)


@in_float32
def attention_transfer(
    student_feature: Tensor,
    teacher_feature: Tensor,
    power: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of attention maps (Zagoruyko & Komodakis 2016, arXiv 1612.03928, equation 2).

    .. math:: \left\| \frac{Q_s}{\|Q_s\|_2} - \frac{Q_t}{\|Q_t\|_2} \right\|_2^2, \quad Q(u) = \sum_c |F_c(u)|^p

    averaged over examples, where Q has one entry for each place u of a map, or for each token; in [0, 2], the same for
    small and large maps, and unchanged when a side is scaled. The paper prints the norm without the square; squared, as
    the authors' program has it, the gradient also exists at equality. Neither the paper's beta / 2 nor the program's
    mean over places is in it: both are a matter of the weight. A side without any activation has the map zero.

    Args:
        student_feature: A map `(B, C, H, W)` or tokens `(B, L, D)`.
        teacher_feature: The same kind; gets no gradient. The widths may differ; the larger attention map is average
            pooled to the smaller one's height and width.
        power: p >= 1; the larger, the more the strongest channels count. For states from a LayerNorm
            p = 2 is nearly constant: but for its scale and shift, their squares sum to the same for each token.
        mask: `(B, L)` bool for tokens, True = counts.
        reduction: `mean` over the examples with anything that counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Features that are not two maps or two sequences of one length, or p < 1, whose gradient is infinite
            at zero.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
        >>> attention_transfer(student, teacher).item()  # two tokens; each side is active at another one
        2.0
    """
    if not power >= 1:
        raise ValueError(f"power must be at least 1, got {power}")
    if student_feature.ndim != teacher_feature.ndim:
        check_same_shape(student_feature, teacher_feature, "feature")
    pair = (_attention(feature, power, mask) for feature in (student_feature, teacher_feature.detach()))
    student, teacher = same_size(*pair)
    check_same_shape(student, teacher, "attention map")
    difference = unit(patterns(student, mask)) - unit(patterns(teacher, mask))
    return reduce(difference.square().sum((1, 2)), counting_examples(mask), reduction)


def _attention(feature: Tensor, power: float, mask: Tensor | None) -> Tensor:
    """Return Q with one channel; each example is scaled to a largest entry of 1.

    Q is compared at length 1, and powers of small entries would be too small for a float32.
    """
    if mask is not None and feature.ndim == 3:
        check_mask(mask, feature.shape[:2])
        feature = only_counted(feature, mask)
    largest = feature.detach().flatten(1).abs().amax(1).view(-1, *[1] * (feature.ndim - 1))
    feature = feature / largest.masked_fill(largest < SHORTEST, torch.inf)
    return feature.abs().pow(power).sum(1 if feature.ndim == 4 else -1, keepdim=True)


class AttentionTransferLoss(LayerwiseTerm):
    """Attention maps of paired layers, averaged over the pairs; see `attention_transfer` for the formula.

    Args:
        kind: `feature_maps` (CNNs) or `hidden` (transformers: which tokens have the largest states).
        layers: Which layer learns from which; see `LayerMap`.
        power: p >= 1.
    """

    averages: Averages = "sequences"

    def __init__(self, kind: Kind = "feature_maps", layers: LayerMap = "uniform", power: float = 2.0) -> None:
        super().__init__(layers)
        self.kind, self.power = kind, power

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the squared distance of the attention maps, averaged over examples."""
        return attention_transfer(student, teacher, self.power, mask)
