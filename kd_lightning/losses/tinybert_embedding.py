"""TinyBERT's embeddings: the student's embeddings regress the teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from kd_lightning.losses.projectors import Projection, projector
from kd_lightning.losses.term import Averages, Reduction, Term, check_same_shape, in_float32, only_counted, token_mask
from kd_lightning.losses.tinybert_hidden import tinybert_hidden
from kd_lightning.types import Batch, ModelOutput


@in_float32
def tinybert_embedding(
    student_embeddings: Tensor, teacher_embeddings: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Mean squared difference of embeddings (Jiao et al. 2019, arXiv 1909.10351, equation 9).

    .. math:: \frac{1}{D} \| W e_s - e_t \|_2^2

    averaged over the positions that count: `tinybert_hidden` of the states before the first layer.

    Args:
        student_embeddings: W e_s: embeddings in the teacher's width, `(B, L, D)`.
        teacher_embeddings: The same shape; gets no gradient.
        mask: `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value a position.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> tinybert_embedding(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]])).item()
        2.0
    """
    check_same_shape(student_embeddings, teacher_embeddings, "embeddings")
    return tinybert_hidden(student_embeddings, teacher_embeddings, mask, reduction)


class TinyBERTEmbeddingLoss(Term):
    """Regressing embeddings; see `tinybert_embedding` for the formula.

    Args:
        projector: Takes the student's embeddings to the teacher's width; see `Projection`, or a module of your own.
    """

    averages: Averages = "tokens"
    needs_student = ("embeddings",)
    needs_teacher = ("embeddings",)

    def __init__(self, projector: Projection | nn.Module = "linear") -> None:
        super().__init__()
        self.projection = projector
        self.projector: nn.Module = nn.Identity()

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projector.

        Raises:
            ValueError: As `projector`.
        """
        pair = student.features["embeddings"], teacher.features["embeddings"]
        self.projector = projector(self.projection, *pair, "embeddings")

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean squared difference over the positions that count."""
        of_student, of_teacher = student.features["embeddings"], teacher.features["embeddings"]
        mask = token_mask(batch, of_student, of_teacher)
        return tinybert_embedding(self.projector(only_counted(of_student, mask)), of_teacher, mask)
