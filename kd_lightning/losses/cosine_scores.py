"""Scores of pairs, regressed by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.pairs import Pairs, PairTerm
from kd_lightning.losses.term import check_same_shape, in_float32
from kd_lightning.types import Batch


@in_float32
def cosine_scores(similarities: Tensor, scores: Tensor) -> Tensor:
    r"""Mean squared difference of cosines and scores (Reimers & Gurevych 2019, arXiv 1908.10084).

    .. math:: \frac{1}{P} \sum_i (s_i - y_i)^2

    Args:
        similarities: The cosine of each pair, `(P,)`.
        scores: Its score, 0 to 1, `(P,)`.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> cosine_scores(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0])).item()
        0.125
    """
    check_same_shape(similarities, scores, "cosines or scores")
    return F.mse_loss(similarities, scores.to(similarities.dtype))


class CosineScoreLoss(PairTerm):
    """Squared error of the cosines of scored pairs; see `cosine_scores` for the formula.

    It uses no teacher.

    Args:
        widths: See `PairTerm`.
    """

    uses_teacher, scored = False, True

    def __init__(self, widths: Sequence[int] = ()) -> None:
        super().__init__(widths)

    def compare(self, student: Tensor, teacher: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the squared error, averaged over pairs."""
        own = student[torch.arange(len(student), device=student.device), pairs.positive]
        return cosine_scores(own, batch["score"][pairs.queries])
