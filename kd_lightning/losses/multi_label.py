"""Multi-label soft targets: each class is a yes-or-no question of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.logit_term import LogitTerm, kl
from kd_lightning.losses.term import (
    Reduction,
    check_mask,
    check_positive,
    check_same_shape,
    in_float32,
    only_counted,
    reduce,
)
from kd_lightning.types import Batch


@in_float32
def multi_label(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Binary soft targets for every class (Yang et al. 2023, L2D, arXiv 2308.06453), in nats.

    .. math:: T^2 \sum_c \mathrm{KL}\left( \mathrm{Bernoulli}(\sigma(z_{t,c} / T)) \,\|\,
              \mathrm{Bernoulli}(\sigma(z_{s,c} / T)) \right)

    with the logistic function sigma. The sum over classes is the divergence of the joint distributions of C independent
    labels, and with one class it is `soft_target` of the logits (z, 0). Unlike softmax's, these probabilities depend on
    the logits' common offset. The paper takes T = 1. The teacher's logits get no gradient. Labels are not read.

    Args:
        student_logits: `(B, C)` or `(B, L, C)`, finite: one logit for each label.
        teacher_logits: The same shape, finite.
        temperature: T > 0; larger is softer.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[4.0, 0.25]]).log()  # odds 4 and 1/4: 2 x 0.19274
        >>> round(multi_label(student, teacher).item(), 5)
        0.38549
    """
    check_same_shape(student_logits, teacher_logits)
    check_mask(mask, student_logits.shape[:-1])
    check_positive("temperature", temperature)
    pair = only_counted(student_logits, mask), only_counted(teacher_logits.detach(), mask)
    yes_or_no_s, yes_or_no_t = (_log_bernoulli(z / temperature) for z in pair)
    return temperature**2 * reduce(kl(yes_or_no_t, yes_or_no_s).sum(-1), mask, reduction)


def _log_bernoulli(logits: Tensor) -> Tensor:
    """Return log (p, 1 - p), `(..., C, 2)`, without the cancellation of 1 - p."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)


class MultiLabelLoss(LogitTerm):
    """Distillation of independent labels; see `multi_label`, and `LogitTerm` for the arguments."""

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return T^2 times the sum of binary divergences."""
        return multi_label(student, teacher, self.now(self.temperature), mask)
