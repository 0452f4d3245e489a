"""TinyBERT's attentions: each student layer regresses the attention of a teacher layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.attentions import check_attentions, without_padding
from kd_lightning.losses.layers import Kind, LayerMap, LayerwiseTerm
from kd_lightning.losses.term import Reduction, in_float32, masked_mean, reduce


@in_float32
def tinybert_attention(
    student_attention: Tensor,
    teacher_attention: Tensor,
    average_heads: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared difference of attentions (Jiao et al. 2019, arXiv 1909.10351, equation 7).

    .. math:: \frac{1}{H L} \sum_{h,k} (a_{s,h,q,k} - a_{t,h,q,k})^2

    for query q, over heads h and the L keys k that count, averaged over the queries that count. The paper compares
    scores before the softmax; these are the probabilities after it, which is what Hugging Face networks return, so
    that values are smaller, do not see what a row's scores have in common, and padding must not be cut off: it is 0
    on both sides. L is each example's own number of tokens, so that padding changes nothing; the published code
    divides by the padded length.

    Args:
        student_attention: `(B, H, L, L)`.
        teacher_attention: The same shape, but for H where heads are averaged; gets no gradient.
        average_heads: Compare the mean over heads, for networks with different numbers of them. Not in the paper.
        mask: `(B, L)` bool, True = counts, as a query and as a key.
        reduction: `mean` over what counts, `sum`, or `none` for one value a query, `(B, L)`.

    Raises:
        ValueError: Shapes that differ, or numbers of heads that differ and are not averaged.

    Example:
        >>> import torch
        >>> tinybert_attention(torch.full((1, 1, 2, 2), 0.5), torch.eye(2).view(1, 1, 2, 2)).item()
        0.25
    """
    if average_heads and student_attention.ndim == teacher_attention.ndim == 4:
        student_attention, teacher_attention = (x.mean(1, keepdim=True) for x in (student_attention, teacher_attention))
    check_attentions(student_attention, teacher_attention, mask, ", or set average_heads=true")
    student, teacher = without_padding(student_attention, mask), without_padding(teacher_attention.detach(), mask)
    squares = F.mse_loss(student, teacher, reduction="none").mean(1)
    return reduce(masked_mean(squares.mT, mask), mask, reduction)


class TinyBERTAttentionLoss(LayerwiseTerm):
    """Regressing attentions layer by layer; see `tinybert_attention` for the formula.

    The paper sums over layers, this is their mean.

    Args:
        layers: See `LayerMap`; `uniform` is the paper's, `emd` that of BERT-EMD.
        average_heads: Compare the mean over heads, for networks with different numbers of them.
    """

    kind: Kind = "attention"

    def __init__(self, layers: LayerMap = "uniform", average_heads: bool = False) -> None:
        super().__init__(layers)
        self.average_heads = average_heads

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean squared difference over the queries and keys that count."""
        return tinybert_attention(student, teacher, self.average_heads, mask)
