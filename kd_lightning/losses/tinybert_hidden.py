"""TinyBERT's hidden states: each student layer regresses the states of a teacher layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.layers import LayerMap, LayerwiseTerm
from kd_lightning.losses.projectors import Projection
from kd_lightning.losses.term import Reduction, check_mask, check_same_shape, in_float32, only_counted, reduce


@in_float32
def tinybert_hidden(
    student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mean squared difference of hidden states (Jiao et al. 2019, arXiv 1909.10351, equation 8).

    .. math:: \frac{1}{D} \| W h_s - h_t \|_2^2

    averaged over the positions that count; the published code also counts padding.

    Args:
        student_hidden: W h_s: one layer's states in the teacher's width, `(B, L, D)`.
        teacher_hidden: The same shape; gets no gradient.
        mask: `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value a position.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> tinybert_hidden(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 1.0]]])).item()
        2.5
    """
    check_same_shape(student_hidden, teacher_hidden, "hidden states")
    check_mask(mask, student_hidden.shape[:-1])
    student, teacher = only_counted(student_hidden, mask), only_counted(teacher_hidden.detach(), mask)
    values = F.mse_loss(student, teacher, reduction="none").mean(-1)
    return reduce(values, mask, reduction)


class TinyBERTHiddenLoss(LayerwiseTerm):
    """Regressing hidden states layer by layer; see `tinybert_hidden` for the formula.

    The paper sums over layers and has one matrix W for all of them. This is the mean over layers, with a matrix and a
    bias for each student layer; a projector of your own is shared by all, as in the paper.

    Args:
        layers: See `LayerMap`; `uniform` is the paper's, `emd` that of BERT-EMD.
        projector: As for `LayerwiseTerm`.
    """

    def __init__(self, layers: LayerMap = "uniform", projector: Projection | nn.Module = "linear") -> None:
        super().__init__(layers, projector)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean squared difference over the positions that count."""
        return tinybert_hidden(student, teacher, mask)
