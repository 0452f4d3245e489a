"""Flow of the solution procedure: how the features of two layers of one network correlate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kd_lightning.losses.projectors import Projection, projector, same_size
from kd_lightning.losses.relations import counting_examples, patterns
from kd_lightning.losses.term import (
    Averages,
    Reduction,
    Term,
    check_same_shape,
    in_float32,
    only_counted,
    reduce,
    token_mask,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def fsp(
    student_layers: Sequence[Tensor],
    teacher_layers: Sequence[Tensor],
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared difference of FSP matrices (Yim, Joo, Bae & Kim 2017, CVPR, equations 1 and 2).

    .. math:: \frac{1}{C D} \sum_{c, d} (G^s_{cd} - G^t_{cd})^2,
              \quad G_{cd} = \frac{1}{P} \sum_{u} F^1_c(u) F^2_d(u)

    averaged over examples, where u goes over the P places of a map, or the P tokens that count, and F^1, F^2 are two
    layers of one network; the larger map is average pooled to the smaller. The paper sums over the entries; their mean
    does not grow with the widths.

    Args:
        student_layers: F^1 and F^2 of the student: maps `(B, C, H, W)` and `(B, D, H', W')`, or tokens `(B, L, C)` and
            `(B, L, D)`.
        teacher_layers: The same of the teacher, with the same C and D; get no gradient. Its maps may have another size.
        mask: `(B, L)` bool for tokens, True = counts.
        reduction: `mean` over the examples with anything that counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: FSP matrices of different shapes, or features without positions.

    Example:
        >>> import torch
        >>> one, two = torch.ones(1, 3, 2), torch.full((1, 3, 1), 2.0)  # 3 tokens of widths 2 and 1
        >>> fsp([one, two], [one, one[:, :, :1]]).item()  # every entry of G is 2 against 1
        1.0
    """
    student, teacher = _flow(student_layers, mask), _flow([layer.detach() for layer in teacher_layers], mask)
    check_same_shape(student, teacher, "FSP matrices")
    return reduce((student - teacher).square().mean((1, 2)), counting_examples(mask), reduction)


def _flow(layers: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Return G, `(B, C, D)`."""
    first, second = (patterns(layer, mask) for layer in same_size(*layers))
    if first.shape[2] != second.shape[2]:
        raise ValueError(f"the two layers have {first.shape[2]} and {second.shape[2]} positions")
    count = first.shape[2] if mask is None else mask.sum(1).clamp(min=1).view(-1, 1, 1)
    return torch.bmm(first, second.transpose(1, 2)) / count


class FSPLoss(Term):
    """The flow from each listed layer to the next, averaged; see `fsp` for the formula.

    Args:
        student_layers: Names of at least two of the student's features; see `kd_lightning.models.features`.
        teacher_layers: As many of the teacher's.
        projector: Takes each of the student's layers to the teacher's width; trained with the student. The paper's
            networks have the same widths: `none`.

    Raises:
        ValueError: Fewer than two layers, or more on one side.
    """

    averages: Averages = "sequences"

    def __init__(
        self, student_layers: Sequence[str], teacher_layers: Sequence[str], projector: Projection = "linear"
    ) -> None:
        super().__init__()
        if len(student_layers) != len(teacher_layers) or len(student_layers) < 2:
            raise ValueError(
                f"student_layers has {len(student_layers)} names and teacher_layers {len(teacher_layers)}: give both "
                "the same number, at least 2"
            )
        self.needs_student, self.needs_teacher = tuple(student_layers), tuple(teacher_layers)
        self.projection = projector
        self.projectors = nn.ModuleList()

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projectors.

        Raises:
            ValueError: As `kd_lightning.losses.projectors.projector`.
        """
        for of_student, of_teacher in zip(self.needs_student, self.needs_teacher, strict=True):
            pair = student.features[of_student], teacher.features[of_teacher]
            self.projectors.append(projector(self.projection, *pair, of_student))

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the flows."""
        if not self.projectors:
            raise ValueError("FSPLoss: the projectors are not built; call Objective.connect first")
        of_teacher = [teacher.features[name] for name in self.needs_teacher]
        of_student = [student.features[name] for name in self.needs_student]
        mask = token_mask(batch, of_student[0], of_teacher[0])
        projected = [projector(only_counted(x, mask)) for projector, x in zip(self.projectors, of_student, strict=True)]
        flows = zip(pairwise(projected), pairwise(of_teacher), strict=True)
        return torch.stack([fsp(of_s, of_t, mask) for of_s, of_t in flows]).mean()
