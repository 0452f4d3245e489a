"""In-batch contrast: a query's positive among all documents of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.pairs import Pairs, PairTerm
from kd_lightning.losses.term import check_positive, in_float32
from kd_lightning.types import Batch


@in_float32
def contrastive(similarities: Tensor, positive: Tensor, others: Tensor, temperature: float = 0.05) -> Tensor:
    r"""Cross-entropy of each query's positive among the batch's documents, in nats.

    .. math:: -\frac{1}{P} \sum_i \log \frac{e^{s_{i,p(i)} / T}}{e^{s_{i,p(i)} / T} + \sum_{j \in N_i} e^{s_{ij} / T}}

    with the cosine :math:`s_{ij}` of query i and document j: InfoNCE (van den Oord, Li & Vinyals 2018, arXiv
    1807.03748) with the batch's other documents as negatives (Henderson et al. 2017, arXiv 1705.00652; "multiple
    negatives ranking").

    Args:
        similarities: `(P, M)`.
        positive: Each query's positive among the documents, `(P,)`.
        others: Which documents are its negatives, `(P, M)` bool.
        temperature: T.

    Raises:
        ValueError: A temperature that is not positive.

    Example:
        >>> contrastive(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), torch.tensor([[False, True]])).item()  # ln 2
        0.6931471824645996
    """
    check_positive("temperature", temperature)
    counted = others | F.one_hot(positive, similarities.shape[1]).bool()
    return F.cross_entropy((similarities / temperature).masked_fill(~counted, -torch.inf), positive)


class ContrastiveLoss(PairTerm):
    """Contrast of unscored pairs with the batch's other documents; see `contrastive` for the formula.

    It uses no teacher: what a student learns from pairs alone.

    Args:
        temperature: T; 0.05 is a scale of 20.
        widths: See `PairTerm`.

    Raises:
        ValueError: A temperature that is not positive.
    """

    uses_teacher = False

    def __init__(self, temperature: float = 0.05, widths: Sequence[int] = ()) -> None:
        super().__init__(widths)
        check_positive("temperature", temperature)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the cross-entropy, averaged over pairs."""
        return contrastive(student, pairs.positive, pairs.others, self.temperature)
