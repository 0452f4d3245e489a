"""Soft targets: the student matches the teacher's softened distribution."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import Reduction, Scheduled, Term, at_least_float32, counted_positions, reduce
from kd_lightning.types import Batch, ModelOutput


def soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Temperature-scaled KL divergence from the teacher's to the student's distribution, in nats.

    .. math:: T^2 \, \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T))

    summed over classes and averaged over the examples (or positions) that count. The factor T^2 keeps the gradient's
    scale the same at every temperature (Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2.1). The teacher's
    logits get no gradient. Computed in log space, in float32 where the inputs are narrower.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite.
        teacher_logits: The same shape, finite.
        temperature: T > 0; larger is softer.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> soft_target(z, z, temperature=4.0).item()
        0.0
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
            "must have the same shape"
        )
    if mask is not None and mask.shape != student_logits.shape[:-1]:
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape {tuple(student_logits.shape[:-1])}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    student_log_probs = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    kl = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * reduce(kl, mask, reduction)


class SoftTargetLoss(Term):
    """Distillation by softened outputs; see `soft_target` for the formula.

    Args:
        temperature: T > 0, or a schedule over training progress.
        causal: For language models: position t answers for token t + 1.
        classes: Compare only the first `classes` logits of each side. For vocabularies that are the same but for
            padding ids at the end, which differ in number between checkpoints of one family.

    Raises:
        ValueError: At the first batch, when the sides' numbers of classes differ and `classes` does not settle it.
    """

    def __init__(self, temperature: Scheduled = 1.0, causal: bool = False, classes: int | None = None) -> None:
        super().__init__()
        self.temperature, self.causal, self.classes = temperature, causal, classes

    def settings(self) -> dict[str, float]:
        """Return the temperature now in force."""
        return {"temperature": self.now(self.temperature)}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return T^2 KL(teacher || student), averaged over examples or valid positions."""
        sizes = student.logits.shape[-1], teacher.logits.shape[-1]
        if self.classes is None and sizes[0] != sizes[1]:
            raise ValueError(
                f"the student has {sizes[0]} classes and the teacher {sizes[1]}: soft targets compare class by class. "
                "If they differ only in padding ids at the end, set this loss's `classes` to the real number"
            )
        if self.classes is not None and self.classes > min(sizes):
            raise ValueError(f"classes={self.classes}, but the student has {sizes[0]} and the teacher {sizes[1]}")
        keep, mask = counted_positions(student.logits, batch, self.causal)
        logits = [output.logits[:, keep, ..., : self.classes] if mask is not None else output.logits[:, : self.classes]
                  for output in (student, teacher)]  # fmt: skip
        return soft_target(logits[0], logits[1], self.now(self.temperature), mask)
