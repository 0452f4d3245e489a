"""Patient knowledge distillation: the student's [CLS] states follow the teacher's through the layers."""

from __future__ import annotations

from torch import Tensor, nn

from kd_lightning.losses.layers import LayerMap, LayerwiseTerm, layer_pairs
from kd_lightning.losses.projectors import Projection
from kd_lightning.losses.relations import unit
from kd_lightning.losses.term import (
    Averages,
    Reduction,
    check_mask,
    check_same_shape,
    in_float32,
    only_counted,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def pkd(
    student_states: Tensor, teacher_states: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared distance of normalised states (Sun, Cheng, Gan & Liu 2019, arXiv 1908.09355, section 3).

    .. math:: \left\| \frac{h_s}{\|h_s\|_2} - \frac{h_t}{\|h_t\|_2} \right\|_2^2 = 2 (1 - \cos(h_s, h_t))

    averaged over examples; in [0, 4]. It ignores the states' lengths; one of length 0 gets no gradient. The norm is
    summed over D, as in the paper; code that averages over D has values, and needs weights, D times as small and as
    large.

    Args:
        student_states: One layer's [CLS] states, `(B, D)`.
        teacher_states: The same shape; gets no gradient.
        mask: `(B,)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> pkd(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
        2.0
    """
    check_same_shape(student_states, teacher_states, "states")
    check_mask(mask, student_states.shape[:-1])
    gap = unit(only_counted(student_states, mask)) - unit(only_counted(teacher_states.detach(), mask))
    return reduce(gap.square().sum(-1), mask, reduction)


class PKDLoss(LayerwiseTerm):
    """Following [CLS] states through the layers; see `pkd` for the formula.

    The first position of each sequence is compared: [CLS] where padding is on the right. The paper's Skip is
    `layers=uniform` and its Last is `layers=last`, both without the networks' last layers, which the outputs' loss
    covers: 6 layers are paired with 2, 4, 6, 8, 10 of 12, or with 7 to 11, counted from 1. The paper sums over layers
    and has students of the teacher's width; this is the mean over layers, and other widths use a projector.

    Args:
        layers: See `LayerMap`; the networks' last layers are left out unless the pairs are given.
        projector: As for `LayerwiseTerm`; `none` is the paper's.

    Raises:
        ValueError: At planning, where leaving out the last layers leaves no pair; or a batch padded on the left.
    """

    averages: Averages = "examples"

    def __init__(self, layers: LayerMap = "uniform", projector: Projection | nn.Module = "none") -> None:
        super().__init__(layers, projector)

    def pair(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """Return the pairs without those of a last layer."""
        pairs = layer_pairs(self.layers, student, teacher)
        if isinstance(self.layers, str):
            pairs = [(s, t) for s, t in pairs if s < student - 1 and t < teacher - 1]
        if not pairs:
            raise ValueError(
                f"layers={self.layers}: the last layers are left out, and the student has {student} and the teacher "
                f"{teacher}, so that no pair is left; give the pairs"
            )
        return pairs

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the pairs of layers."""
        mask = batch.get("attention_mask")
        if mask is not None and not mask[:, 0].all():
            raise ValueError(
                "PKDLoss compares the first position, which is padding where attention_mask[:, 0] is 0: "
                "pad on the right"
            )
        return super().forward(student, teacher, batch)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the squared distance of the normalised first states."""
        return pkd(student[:, 0], teacher[:, 0])
