"""Similarity preserving: examples that are alike for the teacher are alike for the student."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.relations import RelationTerm, check_examples, unit
from kd_lightning.losses.term import in_float32, reduce


@in_float32
def similarity_preserving(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Mean squared difference of similarities (Tung & Mori 2019, arXiv 1907.09682).

    .. math:: \frac{1}{B^2} \|\tilde G_s - \tilde G_t\|_F^2, \quad G = F F^\top, \quad
              \tilde G_{i} = G_i / \|G_i\|_2

    for the matrix F of one feature vector in each row. The same for a feature space that is rotated, or scaled as a
    whole. Two sides that differ by much have a value near 2 / B, so a weight belongs to a batch size. One example alone
    is like itself on both sides: zero. An example whose feature is zero is like none: its row of similarities is zero.

    Args:
        student_feature: `(B, D)`; maps flattened.
        teacher_feature: `(B, D')`; gets no gradient.

    Raises:
        ValueError: Features that are not vectors of the same examples.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0], [0.0]])
        >>> similarity_preserving(student, teacher).item()  # the second example is like nothing for the teacher
        0.25
    """
    check_examples(student_feature, teacher_feature)
    teacher_feature = teacher_feature.detach()
    # a row scaled is the same row at length 1, and no products of small numbers are lost
    student, teacher = (unit(unit(feature) @ feature.T) for feature in (student_feature, teacher_feature))
    return reduce((student - teacher).square(), None, "mean")


class SimilarityPreservingLoss(RelationTerm):
    """Similarities of the examples of a batch; see `similarity_preserving` for the formula.

    Args:
        student_feature: Name of the student's feature; see `RelationTerm`.
        teacher_feature: Name of the teacher's.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of similarities."""
        return similarity_preserving(student, teacher)
