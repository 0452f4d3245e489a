"""Margins: how far a query's positive is above each of its negatives."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.pairs import Pairs, PairTerm
from kd_lightning.losses.term import check_mask, check_same_shape, in_float32, masked_mean
from kd_lightning.types import Batch


@in_float32
def margin_mse(student: Tensor, teacher: Tensor, positive: Tensor, others: Tensor) -> Tensor:
    r"""Mean squared difference of margins (Hofstätter et al. 2020, arXiv 2010.02666).

    .. math:: \frac{1}{P} \sum_i \frac{1}{|N_i|} \sum_{j \in N_i}
              \left( (s_{i,p(i)} - s_{ij}) - (t_{i,p(i)} - t_{ij}) \right)^2

    with scores s of the student and t of the teacher. The paper has one mined negative for each query, scored by a
    cross-encoder; `MarginMSEScoresLoss` has all that the query has, and `MarginMSELoss` all other documents of the
    batch, with the cosines of embeddings as scores. A query without a negative counts zero.

    Args:
        student: Scores of queries and documents, `(P, M)`.
        teacher: The teacher's, of the same shape; gets no gradient.
        positive: Each query's positive among the documents, `(P,)`.
        others: Which documents are its negatives, `(P, M)` bool.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
        >>> margin_mse(student, teacher, torch.tensor([0]), torch.tensor([[False, True]])).item()
        1.0
    """
    check_same_shape(student, teacher, "scores")
    check_mask(others, student.shape)
    margins = [at - at.gather(1, positive[:, None]) for at in (student, teacher.detach())]
    return masked_mean((margins[0] - margins[1]).square().unsqueeze(-1), others).mean()


class MarginMSELoss(PairTerm):
    """Margins of a batch's queries, by the cosines of embeddings; see `margin_mse` for the formula.

    Args:
        widths: See `PairTerm`.
    """

    def compare(self, student: Tensor, teacher: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the squared difference of margins, averaged over pairs."""
        return margin_mse(student, teacher, pairs.positive, pairs.others)
