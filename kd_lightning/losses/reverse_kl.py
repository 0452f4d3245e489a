"""Reverse KL: the student covers only what the teacher finds likely."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, kl, softened
from kd_lightning.losses.term import Reduction, in_float32, reduce
from kd_lightning.types import Batch


@in_float32
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Temperature-scaled KL divergence from the student's to the teacher's distribution, in nats.

    .. math:: T^2 \, \mathrm{KL}(\mathrm{softmax}(z_s / T) \,\|\, \mathrm{softmax}(z_t / T))

    summed over classes. Where the student has not the capacity for all of the teacher's modes, it is cheaper to leave
    one out than to put mass between them (Gu et al. 2023, MiniLLM, arXiv 2306.08543). The paper minimises it over whole
    sequences that the student writes, by policy gradient; this is its term for one prediction, on the data's own
    tokens. T^2 is as in `soft_target`. The teacher's logits get no gradient. Labels are not read.

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
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log1p()
        >>> round(reverse_kl(student, teacher).item(), 6)  # of (1/2, 1/2) from (1/5, 4/5): log(5/4)
        0.223144
    """
    log_s, log_t = softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * reduce(kl(log_s, log_t), mask, reduction)


class ReverseKLLoss(LogitTerm):
    """Distillation by reverse KL; see `reverse_kl` for the formula, `LogitTerm` for the arguments."""

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T^2 KL(student || teacher)."""
        return reverse_kl(student, teacher, self.now(self.temperature), mask)
