"""Neuron selectivity transfer: channels have the same distribution of patterns."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kd_lightning.losses.layers import Kind, LayerMap, LayerwiseTerm
from kd_lightning.losses.projectors import same_size
from kd_lightning.losses.relations import counting_examples, patterns, unit
from kd_lightning.losses.term import Averages, Reduction, in_float32, reduce

Kernel = Literal["polynomial", "linear", "gaussian"]


@in_float32
def nst(
    student_feature: Tensor,
    teacher_feature: Tensor,
    kernel: Kernel = "polynomial",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared maximum mean discrepancy of channel patterns (Huang & Wang 2017, arXiv 1707.01219).

    .. math:: \overline{k(t, t')} + \overline{k(s, s')} - 2 \, \overline{k(s, t)}

    for each example, averaged over examples: each overline is a mean over pairs of channels, s and t are the patterns
    of a student's and a teacher's channel over the places of a map (or over tokens), scaled to length 1. The kernels,
    as in the paper: `linear` x y, `polynomial` (x y)^2, and `gaussian` exp(-|x - y|^2 / (2 sigma^2)), where sigma^2 is
    the mean of |s - t|^2 over the pairs of an example, without a gradient. The same for channels in another order, and
    for channels that are scaled; with the linear kernel it is the squared distance of the mean patterns. A channel
    without any activation has the pattern zero.

    Args:
        student_feature: A map `(B, C, H, W)` or tokens `(B, L, C)`.
        teacher_feature: The same kind, with any number of channels; gets no gradient. The larger map is average pooled
            to the smaller one's height and width.
        kernel: `polynomial`, `linear` or `gaussian`.
        mask: `(B, L)` bool for tokens, True = counts.
        reduction: `mean` over the examples with anything that counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Features that are not two maps or two sequences of one length, or an unknown kernel.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [3.0]]])
        >>> nst(student, teacher).item()  # one channel each, active at different tokens: 1 + 1 - 0
        2.0
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel={kernel!r}: expected one of {', '.join(get_args(Kernel))}")
    pair = same_size(student_feature, teacher_feature.detach())
    student, teacher = (unit(patterns(feature, mask)) for feature in pair)
    if student.shape[::2] != teacher.shape[::2]:
        raise ValueError(
            f"student feature {tuple(student_feature.shape)} and teacher feature {tuple(teacher_feature.shape)} must "
            "be two maps, or two sequences of the same length"
        )
    sides = (teacher, teacher), (student, student), (student, teacher)
    if kernel == "gaussian":
        squared = [torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() for x, y in sides]
        width = squared[2].detach().mean((1, 2), keepdim=True)
        width = width.masked_fill(width == 0, 1.0)  # all patterns are one
        kernels = [torch.exp(-distances / (2 * width)) for distances in squared]
    else:
        kernels = [torch.bmm(x, y.transpose(1, 2)) ** (2 if kernel == "polynomial" else 1) for x, y in sides]
    of_teacher, of_student, across = (values.mean((1, 2)) for values in kernels)
    return reduce(of_teacher + of_student - 2 * across, counting_examples(mask), reduction)


class NSTLoss(LayerwiseTerm):
    """Channel patterns of paired layers, averaged over the pairs; see `nst` for the formula.

    Args:
        kind: `feature_maps` (CNNs) or `hidden` (transformers: patterns over tokens).
        layers: Which layer learns from which; see `LayerMap`. The paper has the last of each: `[[-1, -1]]`.
        kernel: `polynomial`, `linear` or `gaussian`.
    """

    averages: Averages = "sequences"

    def __init__(
        self, kind: Kind = "feature_maps", layers: LayerMap = "uniform", kernel: Kernel = "polynomial"
    ) -> None:
        super().__init__(layers)
        self.kind, self.kernel = kind, kernel

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the squared discrepancy, averaged over examples."""
        return nst(student, teacher, self.kernel, mask)
