"""Annealing: the student regresses logits of the teacher that start small and grow to their full size."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import (
    Averages,
    Reduction,
    Term,
    check_mask,
    check_same_shape,
    compared_logits,
    in_float32,
    only_counted,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def annealing_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: int = 1,
    max_temperature: int = 10,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared difference to annealed logits (Jafari et al. 2021, arXiv 2104.07163, section 3).

    .. math:: \frac{1}{C} \sum_c \left( z_{s,c} - \Phi(T) \, z_{t,c} \right)^2, \quad
              \Phi(T) = 1 - \frac{T - 1}{T_{max}}, \quad 1 \le T \le T_{max}

    averaged over the examples (or positions) that count. At T = 1 it is matching logits. The paper sums over the
    classes; here it is their mean, as in `logit_mse`.

    Args:
        student_logits: `(B, C)` or `(B, L, V)`.
        teacher_logits: The same shape; gets no gradient.
        temperature: T, which falls from T_max to 1 during the training.
        max_temperature: T_max.
        mask: `(B,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example (position).

    Raises:
        ValueError: Shapes that differ, or a temperature outside [1, T_max].

    Example:
        >>> import torch
        >>> annealing_kd(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=6).item()
        0.0
    """
    check_same_shape(student_logits, teacher_logits)
    check_mask(mask, student_logits.shape[:-1])
    if not 1 <= temperature <= max_temperature:
        raise ValueError(f"temperature={temperature} must be between 1 and max_temperature={max_temperature}")
    factor = 1.0 - (temperature - 1) / max_temperature
    student, teacher = only_counted(student_logits, mask), only_counted(teacher_logits.detach(), mask)
    values = F.mse_loss(student, factor * teacher, reduction="none").mean(-1)
    return reduce(values, mask, reduction)


class AnnealingKDLoss(Term):
    """The first phase of annealing KD; see `annealing_kd` for the formula.

    T falls from T_max to 1 in T_max equal parts of the phase, and stays 1 after it. The second phase is learning from
    labels alone: give this term the weight 0 and a `CrossEntropyLoss` the weight 1 from `until` on
    (conf/distillation/annealing_kd.yaml).

    Args:
        max_temperature: T_max >= 1, a whole number: how many sizes the teacher's logits take.
        until: Share of the training that the phase takes, inside (0, 1), as a boundary of `schedules.Step`.
        classes: Compare only the first `classes` logits of each side; see `compared_logits`.

    Raises:
        ValueError: A T_max below 1 or a share not inside (0, 1).
    """

    averages: Averages = "logits"

    def __init__(self, max_temperature: int = 10, until: float = 0.7, classes: int | None = None) -> None:
        super().__init__()
        if max_temperature < 1 or max_temperature != int(max_temperature):
            raise ValueError(f"max_temperature={max_temperature} must be a whole number of at least 1")
        if not 0.0 < until < 1.0:
            raise ValueError(
                f"until={until} must be a share of the training inside (0, 1), since after it only labels are used"
            )
        self.max_temperature, self.until, self.classes = int(max_temperature), until, classes

    @property
    def temperature(self) -> int:
        """The current T."""
        passed = math.floor(self.max_temperature * self.progress / self.until)
        return max(self.max_temperature - passed, 1)

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.temperature}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean squared difference to the annealed logits."""
        logits_s, logits_t, mask = compared_logits(student, teacher, batch, self.classes)
        return annealing_kd(logits_s, logits_t, self.temperature, self.max_temperature, mask)
