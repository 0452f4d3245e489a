"""Embedding regression: the student's vector is the teacher's."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.embedding_term import EmbeddingTerm
from kd_lightning.losses.term import Reduction, check_same_shape, in_float32, reduce


@in_float32
def embedding_mse(student: Tensor, teacher: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""Squared distance of embeddings (Reimers & Gurevych 2020, arXiv 2004.09813).

    .. math:: \| z_s - z_t \|^2

    averaged over texts. The paper has the mean over the D numbers, which is 1 / D of this; for embeddings of length 1
    this is twice `embedding_cosine`, whatever D.

    Args:
        student: `(B, D)`.
        teacher: The same shape; gets no gradient.
        reduction: `mean` over texts, `sum`, or `none` for one value a text.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> embedding_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])).item()
        5.0
    """
    check_same_shape(student, teacher, "embeddings")
    return reduce((student - teacher.detach()).square().sum(-1), None, reduction)


class EmbeddingMSELoss(EmbeddingTerm):
    """Squared distance of the projected embedding from the teacher's; see `embedding_mse` for the formula.

    Args:
        projector: See `EmbeddingTerm`.
        widths: See `EmbeddingTerm`.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the squared distance, averaged over texts."""
        return embedding_mse(student, teacher)
