"""Base class of terms that compare a text's embedding with the teacher's, and their projectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kd_lightning.losses.pairs import cut
from kd_lightning.losses.term import Term
from kd_lightning.types import Batch, ModelOutput

EmbeddingProjector = Literal["pca", "linear", "none"]
"""How a student's embedding reaches the teacher's width, where it differs.

* `pca`: a linear map that begins with the principal directions of the teacher's embeddings of one batch
  (`connecting_batch` of the data), which has no more directions than texts
* `linear`: a linear map with random weights, of embeddings of the same width too
* `none`: none; the widths must agree
"""


class EmbeddingTerm(Term):
    """A term on the embedding of each text, a mean over texts.

    Args:
        projector: See `EmbeddingProjector`; trained with the student.
        widths: Widths at which the first entries of the student's embedding are compared as well, each with a projector
            of its own; the value is the mean over these and the whole.

    Raises:
        ValueError: An unknown projector; when connected, widths that differ without one.
    """

    def __init__(self, projector: EmbeddingProjector = "pca", widths: Sequence[int] = ()) -> None:
        super().__init__()
        if projector not in get_args(EmbeddingProjector):
            raise ValueError(f"projector={projector!r}: expected one of {', '.join(get_args(EmbeddingProjector))}")
        self.kind, self.widths = projector, list(widths)
        self.projectors: nn.ModuleList | None = None

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the projectors.

        Raises:
            ValueError: Widths that differ without one, or outputs that are no embeddings.
        """
        parts = cut(_vectors(student), self.widths)
        self.projectors = nn.ModuleList([self._projector(part.shape[1], _vectors(teacher)) for part in parts])

    def _projector(self, width: int, teacher: Tensor) -> nn.Module:
        if width == teacher.shape[1] and self.kind != "linear":
            return nn.Identity()
        if self.kind == "none":
            raise ValueError(
                f"the student's embedding is {width} wide and the teacher's {teacher.shape[1]}, and projector=none: "
                "use pca or linear"
            )
        linear = nn.Linear(width, teacher.shape[1])
        if self.kind == "pca":
            with torch.no_grad():
                linear.weight.copy_(principal_directions(teacher, width))
                linear.bias.zero_()
        return linear

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean over texts, of embeddings of one width `(B, D)`."""

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over texts and widths."""
        if self.projectors is None:
            raise ValueError(f"{type(self).__name__}: the projectors are not built; call Objective.connect first")
        parts = zip(self.projectors, cut(student.logits, self.widths), strict=True)
        return torch.stack([self.compare(project(part), teacher.logits) for project, part in parts]).mean()


def _vectors(output: ModelOutput) -> Tensor:
    if output.logits.ndim != 2:
        raise ValueError(f"outputs {tuple(output.logits.shape)} are no embeddings (B, D)")
    return output.logits


def principal_directions(embeddings: Tensor, count: int) -> Tensor:
    """Return the `count` directions with the largest sums of squares, as columns `(D, count)`.

    Where there are fewer embeddings than directions, others that are orthogonal to them follow; zeros where `count` is
    above D. A direction's sign is such that its largest entry is positive.

    Args:
        embeddings: `(B, D)`.
        count: How many.

    >>> principal_directions(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]), 2)
    tensor([[0., 1.],
            [1., 0.],
            [0., 0.]])
    """
    rows = torch.linalg.svd(embeddings.detach().double(), full_matrices=True)[2][:count]
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    found = (rows * signs).T
    missing = count - found.shape[1]
    return torch.cat([found, found.new_zeros(len(found), missing)], dim=1).to(embeddings.dtype)
