"""Correlation congruence: the student keeps the kernel matrix of a batch."""

from __future__ import annotations

import math

from torch import Tensor

from kd_lightning.losses.relations import RelationTerm, check_examples, unit
from kd_lightning.losses.term import check_positive, in_float32, reduce


@in_float32
def correlation_congruence(
    student_feature: Tensor, teacher_feature: Tensor, gamma: float = 0.4, order: int = 2
) -> Tensor:
    r"""Mean squared difference of kernel matrices (Peng et al. 2019, arXiv 1904.01802).

    .. math:: \frac{1}{B^2} \|K_s - K_t\|_F^2, \quad
              K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} \left( \frac{f_i \cdot f_j}{\|f_i\| \|f_j\|}
              \right)^p

    which is the Taylor expansion of the Gaussian kernel exp(-gamma |a - b|^2) of the examples' directions a, b. The
    same for a feature space that is rotated, and for examples that are scaled. The diagonal is the same on both sides;
    as in the paper it counts in the mean. One example alone gives zero; a zero vector has the cosine 0 to all.

    Args:
        student_feature: `(B, D)`.
        teacher_feature: `(B, D')`; gets no gradient.
        gamma: > 0; the larger, the more it is a matter of the nearest examples.
        order: P >= 1, where the expansion ends.

    Raises:
        ValueError: Features that are not vectors of the same examples, or a number out of range.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [2.0]])
        >>> f"{correlation_congruence(student, teacher, gamma=0.5, order=1).item():.4f}"  # (1 / 2) exp(-1)^2
        '0.0677'
    """
    check_examples(student_feature, teacher_feature)
    check_positive("gamma", gamma)
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    student, teacher = (_kernel(feature, gamma, order) for feature in (student_feature, teacher_feature.detach()))
    return reduce((student - teacher).square(), None, "mean")


def _kernel(feature: Tensor, gamma: float, order: int) -> Tensor:
    directions = unit(feature)
    cosines = directions @ directions.T
    powers = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * sum(powers[1:], powers[0])


class CorrelationCongruenceLoss(RelationTerm):
    """Kernel matrices of a batch; see `correlation_congruence` for the formula.

    The paper's loss between the two sides' feature vectors themselves is `HintLoss`, a term of its own.

    Args:
        student_feature: Name of the student's feature; see `RelationTerm`.
        teacher_feature: Name of the teacher's.
        gamma: > 0.
        order: P >= 1.
    """

    def __init__(
        self, student_feature: str = "pooled", teacher_feature: str = "pooled", gamma: float = 0.4, order: int = 2
    ) -> None:
        super().__init__(student_feature, teacher_feature)
        self.gamma, self.order = gamma, order

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of the kernel matrices."""
        return correlation_congruence(student, teacher, self.gamma, self.order)
