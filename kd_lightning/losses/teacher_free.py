"""Teacher-free distillation: soft targets from a virtual teacher that is always right and nearly sure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_lightning.losses.logit_term import kl, labelled, softened
from kd_lightning.losses.term import (
    Averages,
    Reduction,
    Scheduled,
    Term,
    check_mask,
    check_positive,
    in_float32,
    kept_rows,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def teacher_free(
    student_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    correct_probability: float = 0.99,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Teacher-free regularisation, Tf-KD_reg (Yuan et al. 2019, arXiv 1909.11723), in nats.

    .. math:: T^2 \, \mathrm{KL}\left( \mathrm{softmax}\left(\tfrac{\log u}{T}\right) \Big\| \,
              \mathrm{softmax}\left(\tfrac{z_s}{T}\right) \right), \quad
              u_c = \begin{cases} a & c = y \\ (1 - a) / (C - 1) & c \ne y \end{cases}

    At T = 1 it has the gradient of cross-entropy with label smoothing :math:`\epsilon = (1 - a) \, C / (C - 1)`; a
    larger T spreads the virtual teacher u further, and softens the student with it. u is softened like any distribution
    and T^2 is as in `soft_target`; the published code differs from the paper in taking the softmax of u itself and the
    student at T = 1. Examples *without a label* (-100) do not count.

    The paper's other form, Tf-KD_self, needs no loss of its own: it is `soft_target` with a trained copy of the student
    as the teacher.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`, finite, C >= 2.
        labels: `(B,)` or `(B, L)` int64; -100 does not count.
        temperature: T > 0; larger is softer. The paper takes 20 and more.
        correct_probability: a, in (0, 1); the paper takes 0.9 and more.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, fewer than two classes, or a number out of its range.

    Example:
        >>> import torch
        >>> round(teacher_free(torch.zeros(1, 2), torch.tensor([0]), correct_probability=0.8).item(), 6)
        0.192745
    """
    check_mask(mask, student_logits.shape[:-1])
    check_positive("temperature", temperature)
    if not 0.0 < correct_probability < 1.0:
        raise ValueError(f"correct_probability must be in (0, 1), got {correct_probability}")
    labels, counts = labelled(labels, student_logits, mask)
    others = student_logits.shape[-1] - 1
    log_u = torch.full_like(student_logits, math.log((1 - correct_probability) / others))
    log_u = log_u.scatter(-1, labels.unsqueeze(-1), math.log(correct_probability))
    log_s, log_t = softened(student_logits, log_u, temperature, counts)
    return temperature**2 * reduce(kl(log_t, log_s), counts, reduction)


class TeacherFreeLoss(Term):
    """Soft targets without a teacher; see `teacher_free` for the formula. Reads `labels`.

    Args:
        temperature: T > 0, or a schedule over training progress.
        correct_probability: The virtual teacher's probability of the label, in (0, 1).
    """

    averages: Averages = "labels"
    uses_teacher = False

    def __init__(self, temperature: Scheduled = 1.0, correct_probability: float = 0.99) -> None:
        super().__init__()
        self.temperature, self.correct_probability = temperature, correct_probability

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return T^2 KL(virtual teacher || student), averaged over labelled examples or positions."""
        mask, temperature = kept_rows(student.logits, batch), self.now(self.temperature)
        return teacher_free(student.logits, batch["labels"], temperature, self.correct_probability, mask)
