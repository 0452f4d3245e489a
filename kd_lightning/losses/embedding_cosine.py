"""Embedding directions: the student's vector points where the teacher's does."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.embedding_term import EmbeddingTerm
from kd_lightning.losses.relations import unit
from kd_lightning.losses.term import Reduction, check_same_shape, in_float32, reduce


@in_float32
def embedding_cosine(student: Tensor, teacher: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""One less the cosine of embeddings (Zhang et al. 2024, arXiv 2412.19048, its first loss).

    .. math:: 1 - \frac{z_s \cdot z_t}{\|z_s\| \|z_t\|}

    averaged over texts. A zero vector has the cosine 0 and gets no gradient.

    Args:
        student: `(B, D)`.
        teacher: The same shape; gets no gradient.
        reduction: `mean` over texts, `sum`, or `none` for one value a text.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> embedding_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])).item()
        1.0
    """
    check_same_shape(student, teacher, "embeddings")
    return reduce(1 - (unit(student) * unit(teacher.detach())).sum(-1), None, reduction)


class EmbeddingCosineLoss(EmbeddingTerm):
    """Cosine of the projected embedding and the teacher's; see `embedding_cosine` for the formula.

    Args:
        projector: See `EmbeddingTerm`.
        widths: See `EmbeddingTerm`.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return one less the cosine, averaged over texts."""
        return embedding_cosine(student, teacher)
