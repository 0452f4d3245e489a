"""DistilBERT's cosine loss: the student's last hidden states point where the teacher's do."""

from __future__ import annotations

from torch import Tensor, nn

from kd_lightning.losses.layers import LayerwiseTerm
from kd_lightning.losses.projectors import Projection
from kd_lightning.losses.relations import unit
from kd_lightning.losses.term import Reduction, check_mask, check_same_shape, in_float32, only_counted, reduce


@in_float32
def distilbert_cosine(
    student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""One minus the cosine of hidden states (Sanh, Debut, Chaumond & Wolf 2019, arXiv 1910.01108).

    .. math:: 1 - \frac{h_s \cdot h_t}{\|h_s\| \|h_t\|}

    averaged over the positions that count; in [0, 2]. It ignores the states' lengths; one of length 0
    has the cosine 0 and gets no gradient.

    Args:
        student_hidden: `(B, L, D)`.
        teacher_hidden: The same shape; gets no gradient.
        mask: `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value a position.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> distilbert_cosine(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]])).item()
        1.0
    """
    check_same_shape(student_hidden, teacher_hidden, "hidden states")
    check_mask(mask, student_hidden.shape[:-1])
    student, teacher = only_counted(student_hidden, mask), only_counted(teacher_hidden.detach(), mask)
    cosine = (unit(student) * unit(teacher)).sum(-1)
    return reduce(1.0 - cosine, mask, reduction)


class DistilBERTCosineLoss(LayerwiseTerm):
    """Aligning the last hidden states; see `distilbert_cosine` for the formula.

    Args:
        projector: As for `LayerwiseTerm`; `none` is the paper's, whose student has the teacher's width.
    """

    def __init__(self, projector: Projection | nn.Module = "none") -> None:
        super().__init__([(-1, -1)], projector)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return one minus the cosine over the positions that count."""
        return distilbert_cosine(student, teacher, mask)
