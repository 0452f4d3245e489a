"""Standardized logits: any loss on logits, applied to z-scores."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import Depth, Term, in_float32
from kd_lightning.types import Batch, ModelOutput


@in_float32
def standardized(logits: Tensor) -> Tensor:
    r"""Z-scores of each example's logits (Sun et al. 2024, Logit Standardization, arXiv 2403.01427).

    .. math:: \frac{z_c - \bar z}{\sigma(z)}, \quad \sigma(z)^2 = \frac{1}{C} \sum_c (z_c - \bar z)^2

    so that a loss on them compares the relations of the teacher's logits, not their scale: the result
    is the same for a z + b with any a > 0 and b. The variance has 1e-8 added: equal logits give zeros. (Published code
    divides by the deviation with C - 1, a constant factor that the loss's temperature takes up.)

    With *two classes* the z-scores are 1 and -1 whatever the logits: only which one is larger is left, and there is no
    gradient.

    Args:
        logits: `(B, C)` or `(B, L, V)`, finite.

    Example:
        >>> import torch
        >>> standardized(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    finite = logits.isfinite().all(-1, keepdim=True)  # a row that is not may be one that does not count
    z = logits.where(finite, 0.0)
    z = z - z.detach().amax(-1, keepdim=True)  # without rounding, so that equal logits of any size are zeros
    return F.layer_norm(z, z.shape[-1:], eps=1e-8).where(finite, torch.nan)


class StandardizedLoss(Term):
    """A loss on logits, given z-scores in their place; see `standardized` for the formula.

    The temperature is the wrapped term's own. If that compares only the first `classes` logits, the z-scores are of
    those.

    Args:
        term: Any term that reads logits, e.g. `SoftTargetLoss(temperature=2.0)`.
    """

    def __init__(self, term: Term) -> None:
        super().__init__()
        self.term = term
        self.uses_teacher = term.uses_teacher
        self.needs_student, self.needs_teacher = term.needs_student, term.needs_teacher

    def plan(self, student: Depth, teacher: Depth) -> None:
        """Let the wrapped term plan."""
        self.term.plan(student, teacher)
        self.needs_student, self.needs_teacher = self.term.needs_student, self.term.needs_teacher

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Connect the wrapped term; warn if there are two classes, whose z-scores are constant."""
        student, teacher = self._standardized(student), self._standardized(teacher)
        if student.logits.shape[-1] == 2:
            warnings.warn(
                "StandardizedLoss: there are 2 classes, and their z-scores are 1 and -1 whatever the logits: this term "
                "has no gradient. It needs 3 classes or more; for 2 use the wrapped loss alone",
                stacklevel=2,
            )
        self.term.connect(student, teacher, examples)

    def counts(self, batch: Batch) -> Tensor:
        """Return the wrapped term's."""
        return self.term.counts(batch)

    def share(self, own: Tensor, mean: Tensor) -> Tensor:
        """Return the wrapped term's."""
        return self.term.share(own, mean)

    def settings(self) -> dict[str, float]:
        """Return the wrapped term's settings."""
        self.term.progress = self.progress
        return self.term.settings()

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the wrapped term's value for z-scores."""
        return self.parts(student, teacher, batch).sum()

    def parts(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the wrapped term's parts for z-scores."""
        self.term.progress = self.progress
        return self.term.parts(self._standardized(student), self._standardized(teacher), batch)

    def _standardized(self, output: ModelOutput) -> ModelOutput:
        classes = getattr(self.term, "classes", None)
        return ModelOutput(standardized(output.logits[..., :classes]), output.features)
