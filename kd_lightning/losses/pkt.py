"""Probabilistic knowledge transfer: the student keeps each example's distribution over its neighbours."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.relations import RelationTerm, check_examples, off_diagonal, unit
from kd_lightning.losses.term import in_float32

_TINY = 1e-7  # the affinity of exactly opposite vectors is 0, and its logarithm is not a number to learn from


@in_float32
def pkt(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""KL divergence of neighbourhoods, in nats (Passalis & Tefas 2018, arXiv 1803.10837).

    .. math:: \frac{1}{B} \sum_j \sum_{i \ne j} p^t_{i|j} \log \frac{p^t_{i|j}}{p^s_{i|j}}, \quad
              p_{i|j} = \frac{K(f_i, f_j)}{\sum_{k \ne j} K(f_k, f_j)}, \quad
              K(a, b) = \frac{1}{2} \left( \frac{a \cdot b}{\|a\| \|b\|} + 1 \right)

    The same for a feature space that is rotated, and for examples that are scaled. The paper sums over j where this is
    the mean; the authors' program also counts each example among its own neighbours, which the paper does not. A zero
    vector has the cosine 0 to all others. One example alone has no neighbours: zero.

    Args:
        student_feature: `(B, D)`.
        teacher_feature: `(B, D')`; gets no gradient.

    Raises:
        ValueError: Features that are not vectors of the same examples.

    Example:
        >>> import torch
        >>> student, teacher = torch.ones(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> f"{pkt(student, teacher).item():.4f}"  # of the last two the teacher's neighbours have 1/3 and 2/3
        '0.0378'
    """
    check_examples(student_feature, teacher_feature)
    student, teacher = (_log_neighbours(feature) for feature in (student_feature, teacher_feature.detach()))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / max(len(student), 1)


def _log_neighbours(feature: Tensor) -> Tensor:
    """Return log p, `(B, B - 1)`."""
    directions = unit(feature)
    affinities = off_diagonal((directions @ directions.T + 1) / 2)
    return affinities.clamp(min=_TINY).log().log_softmax(1)


class PKTLoss(RelationTerm):
    """Distributions over neighbours in a batch; see `pkt` for the formula.

    Args:
        student_feature: Name of the student's feature; see `RelationTerm`.
        teacher_feature: Name of the teacher's.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the KL divergence of neighbourhoods, averaged over examples."""
        return pkt(student, teacher)
