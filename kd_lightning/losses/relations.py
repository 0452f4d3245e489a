"""Helpers of losses that compare relations of examples, layers, channels or positions."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from kd_lightning.losses.term import Term, check_mask, masked_mean, only_counted
from kd_lightning.types import Batch, ModelOutput

SHORTEST = 1e-18
"""Shorter vectors count as zero in every precision: float32 cannot represent their squares and gradients well."""


class RelationTerm(Term):
    """A term that compares how the examples of a batch relate to one another on either side.

    An example is one vector: of a token feature `(B, L, D)` the mean over its tokens, of a map `(B, C, H, W)` all its
    entries. Student and teacher may read different tokens, or images of different sizes.

    Args:
        student_feature: Name of the student's feature; see `kd_lightning.models.features`.
        teacher_feature: Name of the teacher's.
    """

    def __init__(self, student_feature: str = "pooled", teacher_feature: str = "pooled") -> None:
        super().__init__()
        self.needs_student, self.needs_teacher = (student_feature,), (teacher_feature,)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the value, a scalar, for one vector an example: `(B, D)` and `(B, D')`."""

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return `compare` of the two sides' vectors."""
        mask = batch.get("attention_mask")
        return self.compare(
            _vectors(student.features[self.needs_student[0]], mask),
            _vectors(teacher.features[self.needs_teacher[0]], batch.get("teacher_attention_mask", mask)),
        )


def _vectors(feature: Tensor, mask: Tensor | None) -> Tensor:
    if feature.ndim == 3:
        return masked_mean(feature, None if mask is None else mask.bool())
    return feature.flatten(1)


def check_examples(student: Tensor, teacher: Tensor) -> None:
    """Refuse features that are not one vector for each of the same examples.

    Raises:
        ValueError: Names both shapes.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student feature {tuple(student.shape)} and teacher feature {tuple(teacher.shape)} must be vectors (B, D) "
            "of the same examples"
        )


def unit(x: Tensor) -> Tensor:
    """Scale vectors (the last axis) to length 1; one below `SHORTEST` becomes zero and gets no gradient.

    `F.normalize` would divide a zero vector's gradient by its tiny epsilon: 1e12 times what it should be.
    """
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length < SHORTEST, torch.inf)


def off_diagonal(x: Tensor) -> Tensor:
    """Return `(B, B - 1)`: the entries of a square matrix that are not on its diagonal, row by row."""
    size = len(x)
    if not size:
        return x
    return x.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


def patterns(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each channel at each of P positions, `(B, C, P)`, zero at masked positions.

    Args:
        feature: A map `(B, C, H, W)`, P = H W, or tokens `(B, L, C)`, P = L.
        mask: `(B, L)` bool for tokens, True = counts.

    Raises:
        ValueError: A feature without positions, a mask for a map, or one of another shape.
    """
    if feature.ndim == 4 and mask is None:
        return feature.flatten(2)
    if feature.ndim != 3:
        raise ValueError(
            f"feature {tuple(feature.shape)}: expected a map (B, C, H, W) without a mask, or tokens (B, L, D)"
        )
    check_mask(mask, feature.shape[:2])
    return only_counted(feature, mask).transpose(1, 2)


def counting_examples(mask: Tensor | None) -> Tensor | None:
    """Return `(B,)`: which examples have any position that counts; None for all."""
    return None if mask is None else mask.any(1)
