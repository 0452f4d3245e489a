"""Soft targets of spans: the student matches where the teacher lets them start and end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.logit_term import kl
from kd_lightning.losses.term import (
    Reduction,
    Scheduled,
    Term,
    check_mask,
    check_positive,
    check_same_shape,
    in_float32,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def span_soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Temperature-scaled KL divergence of the distributions of starts and of ends over positions, in nats.

    .. math:: \frac{T^2}{2} \sum_{c \in \{start, end\}}
              \mathrm{KL}(\mathrm{softmax}_l(z^t_{lc} / T) \,\|\, \mathrm{softmax}_l(z^s_{lc} / T))

    over the positions l that the mask keeps, and averaged over the windows that have any: soft targets (Hinton, Vinyals
    & Dean 2015, arXiv 1503.02531) over positions, as DistilBERT has them for SQuAD (Sanh et al. 2019, arXiv
    1910.01108). The teacher's logits get no gradient.

    Args:
        student_logits: Of starts and ends, `(B, L, 2)`; finite where the mask keeps them.
        teacher_logits: The same shape.
        temperature: T > 0; larger is softer.
        mask: `(B, L)` bool, True = a span may start or end there; None: anywhere.
        reduction: `mean` over the windows, `sum`, or `none` for one value a window, `(B,)`.

    Raises:
        ValueError: Shapes that differ, or a temperature that is not positive and finite.

    Example:
        >>> z = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
        >>> keep = torch.tensor([[True, True, False]])
        >>> span_soft_target(z, z.flip(1).roll(-1, 1), temperature=4.0, mask=keep).item() > 0
        True
        >>> span_soft_target(z, z, temperature=4.0, mask=keep).item()
        0.0
    """
    check_same_shape(student_logits, teacher_logits)
    check_positive("temperature", temperature)
    log_s, log_t = (
        log_positions(z / temperature, mask).transpose(1, 2) for z in (student_logits, teacher_logits.detach())
    )
    values = temperature**2 * kl(log_t, log_s).mean(1)
    return reduce(values, None if mask is None else mask.any(1), reduction)


def log_positions(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return log softmax over the positions that the mask keeps, zeros at others, `(B, L, C)`.

    What stands at others reaches neither value nor gradient.

    Args:
        logits: `(B, L, C)`.
        mask: `(B, L)` bool; None: all are kept. A row without any is all zeros.

    Raises:
        ValueError: Logits without positions, or a mask of another shape.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits {tuple(logits.shape)}: expected those of starts and ends, (B, L, 2)")
    check_mask(mask, logits.shape[:2])
    if mask is None:
        return F.log_softmax(logits, dim=1)
    out = ~mask.unsqueeze(2)
    hidden = torch.where(mask.any(1)[:, None, None], -torch.inf, 0.0).to(logits.dtype)
    return F.log_softmax(torch.where(out, hidden, logits), dim=1).masked_fill(out, 0.0)


class SpanSoftTargetLoss(Term):
    """Distillation by softened starts and ends; see `span_soft_target` for the formula.

    Args:
        temperature: T > 0, or a schedule over training progress.
    """

    def __init__(self, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def counts(self, batch: Batch) -> Tensor:
        """Return how many windows have a position that counts, `(1,)`."""
        return batch["keep"].any(1).sum(dtype=torch.float32).view(1) if "keep" in batch else super().counts(batch)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the batch's windows."""
        return span_soft_target(student.logits, teacher.logits, self.now(self.temperature), batch.get("keep"))
