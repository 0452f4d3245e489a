"""Relational distillation: the student keeps the distances and angles between examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.relations import SHORTEST, RelationTerm, check_examples, off_diagonal, unit
from kd_lightning.losses.term import in_float32, reduce


@in_float32
def rkd_distance(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Huber loss of relative distances (Park, Kim, Lu & Cho 2019, arXiv 1904.05068).

    .. math:: \frac{1}{B (B - 1)} \sum_{i \ne j} h(\psi^s_{ij} - \psi^t_{ij}), \quad
              \psi_{ij} = \frac{\|f_i - f_j\|_2}{\mu}, \quad
              \mu = \frac{1}{B (B - 1)} \sum_{i \ne j} \|f_i - f_j\|_2

    with h(x) = x^2 / 2 for |x| < 1, else |x| - 1/2. The same for a feature space that is rotated, shifted or scaled.
    The paper sums over pairs where this is the mean; the authors' program leaves pairs at distance zero out of mu and
    counts the diagonal in the mean, which the paper does not. Two examples at one point get no gradient from their
    distance. One example alone, which has no pair, gives zero; where all examples are at one point psi is 0.

    Args:
        student_feature: `(B, D)`.
        teacher_feature: `(B, D')`; gets no gradient.

    Raises:
        ValueError: Features that are not vectors of the same examples.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [0.0], [2.0]])
        >>> rkd_distance(student, teacher).item()  # (3, 3, 6) / 4 against (0, 6, 6) / 4: (2 / 3) (1/2) (3/4)^2
        0.1875
    """
    check_examples(student_feature, teacher_feature)
    student, teacher = (_relative_distances(feature) for feature in (student_feature, teacher_feature.detach()))
    return reduce(F.smooth_l1_loss(student, teacher, reduction="none"), None, "mean")


@in_float32
def rkd_angle(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Huber loss of the angles' cosines (Park, Kim, Lu & Cho 2019, arXiv 1904.05068).

    .. math:: \frac{1}{B (B - 1) (B - 2)} \sum_{i, j, k \ \text{distinct}} h(c^s_{ijk} - c^t_{ijk}), \quad
              c_{ijk} = \left\langle \frac{f_i - f_j}{\|f_i - f_j\|}, \frac{f_k - f_j}{\|f_k - f_j\|} \right\rangle

    with h as in `rkd_distance`. The same for a feature space that is rotated, shifted or scaled. The paper sums over
    triplets where this is the mean; the authors' program divides by B^3. A triplet with two examples at one point has
    no angle: its cosine counts as 0 and sends no gradient. Fewer than three examples give zero. Memory: B^2 (B + D)
    numbers a side.

    Args:
        student_feature: `(B, D)`.
        teacher_feature: `(B, D')`; gets no gradient.

    Raises:
        ValueError: Features that are not vectors of the same examples.

    Example:
        >>> import torch
        >>> right = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        >>> straight = torch.tensor([[1.0], [0.0], [-1.0]])
        >>> f"{rkd_angle(right, straight).item():.4f}"  # cosines (0, 0.71, 0.71) against (-1, 1, 1)
        '0.1953'
    """
    check_examples(student_feature, teacher_feature)
    student, teacher = (_angles(feature) for feature in (student_feature, teacher_feature.detach()))
    size = len(student)
    same = torch.eye(size, dtype=torch.bool, device=student.device)  # i = k; where i = j or j = k both sides are 0
    values = F.smooth_l1_loss(student, teacher, reduction="none").masked_fill(same, 0.0)
    return values.sum() / max(size * (size - 1) * (size - 2), 1)


def _relative_distances(feature: Tensor) -> Tensor:
    """Return psi, `(B, B - 1)`."""
    # Not by way of a product of matrices: its rounding would leave two equal examples a small distance apart.
    distances = off_diagonal(torch.cdist(feature, feature, compute_mode="donot_use_mm_for_euclid_dist"))
    mean = reduce(distances, None, "mean")
    return distances / mean.masked_fill(mean < SHORTEST, torch.inf)


def _angles(feature: Tensor) -> Tensor:
    """Return the cosine of the angle i j k at [j, i, k], `(B, B, B)`."""
    directions = unit(feature.unsqueeze(0) - feature.unsqueeze(1))  # [j, i] = from j to i
    return torch.bmm(directions, directions.transpose(1, 2))


class RKDDistanceLoss(RelationTerm):
    """Relative distances between the examples of a batch; see `rkd_distance` for the formula.

    Args:
        student_feature: Name of the student's feature; see `RelationTerm`.
        teacher_feature: Name of the teacher's.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean Huber loss over pairs."""
        return rkd_distance(student, teacher)


class RKDAngleLoss(RelationTerm):
    """Angles between the examples of a batch; see `rkd_angle` for the formula.

    Args:
        student_feature: Name of the student's feature; see `RelationTerm`.
        teacher_feature: Name of the teacher's.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean Huber loss over triplets."""
        return rkd_angle(student, teacher)
