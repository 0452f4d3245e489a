"""Similarity distributions: a batch's texts are as near to each other as they are for the teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.pairs import cut
from kd_lightning.losses.relations import check_examples, off_diagonal, unit
from kd_lightning.losses.term import Term, check_positive, in_float32
from kd_lightning.types import Batch, ModelOutput


@in_float32
def similarity_kl(student: Tensor, teacher: Tensor, temperature: float = 0.05) -> Tensor:
    r"""KL divergence of each text's distribution over the others, in nats.

    .. math:: \frac{1}{B} \sum_i \sum_{j \ne i} p^t_{ij} \log \frac{p^t_{ij}}{p^s_{ij}}, \quad
              p_{ij} = \frac{e^{\cos(z_i, z_j) / T}}{\sum_{k \ne i} e^{\cos(z_i, z_k) / T}}

    As SEED (Fang et al. 2021, arXiv 2101.04731), which compares with a queue of the teacher's embeddings where this has
    the batch, on both sides their own. Widths may differ, and either space may be rotated. Of a zero vector all cosines
    are 0. One text alone has no others: zero.

    Args:
        student: Embeddings `(B, D)`.
        teacher: `(B, D')`; gets no gradient.
        temperature: T, of both sides.

    Raises:
        ValueError: Other shapes, or a temperature that is not positive.

    Example:
        >>> student, teacher = torch.ones(3, 2), torch.eye(3)
        >>> similarity_kl(student, teacher).item()
        0.0
    """
    check_examples(student, teacher)
    check_positive("temperature", temperature)
    own, expected = (_distributions(embeddings, temperature) for embeddings in (student, teacher.detach()))
    return F.kl_div(own, expected, reduction="sum", log_target=True) / max(len(student), 1)


def _distributions(embeddings: Tensor, temperature: float) -> Tensor:
    """Return log p, `(B, B - 1)`."""
    directions = unit(embeddings)
    return (off_diagonal(directions @ directions.T) / temperature).log_softmax(1)


class SimilarityKLLoss(Term):
    """Distributions over a batch's other texts; see `similarity_kl` for the formula.

    Args:
        temperature: T.
        widths: Widths at which the first entries of the student's embedding are compared as well; the value is the mean
            over these and the whole.

    Raises:
        ValueError: A temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.05, widths: Sequence[int] = ()) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature, self.widths = temperature, list(widths)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the divergence, averaged over texts and widths."""
        parts = cut(student.logits, self.widths)
        return torch.stack([similarity_kl(part, teacher.logits, self.temperature) for part in parts]).mean()
