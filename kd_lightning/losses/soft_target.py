"""Soft targets: the student matches the teacher's softened distribution."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.logit_term import kl, softened
from kd_lightning.losses.term import Averages, Reduction, Scheduled, Term, compared_logits, in_float32, reduce
from kd_lightning.types import Batch, ModelOutput


@in_float32
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
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * reduce(kl(log_t, log_s), mask, reduction)


class SoftTargetLoss(Term):
    """Distillation by softened outputs; see `soft_target` for the formula.

    Args:
        temperature: T > 0, or a schedule over training progress.
        classes: Compare only the first `classes` logits of each side. For vocabularies that are the same but for
            padding ids at the end, which differ in number between checkpoints of one family.

    Raises:
        ValueError: At the first batch, if the numbers of classes differ and `classes` is None.
    """

    averages: Averages = "logits"

    def __init__(self, temperature: Scheduled = 1.0, classes: int | None = None) -> None:
        super().__init__()
        self.temperature, self.classes = temperature, classes

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return T^2 KL(teacher || student), averaged over examples or valid positions."""
        logits_s, logits_t, mask = compared_logits(student, teacher, batch, self.classes)
        return soft_target(logits_s, logits_t, self.now(self.temperature), mask)
