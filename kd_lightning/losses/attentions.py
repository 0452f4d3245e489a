"""Row-wise comparison of attentions and of relations between positions, shared by several methods.

Shape suffixes: H heads, L positions, D width. A row is one query's distribution over keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import Reduction, check_mask, check_same_shape, only_counted, reduce

SMALLEST = 1e-12
"""Lower bound of probabilities in logarithms: it bounds the divergence where the student's is zero."""


def check_attentions(student: Tensor, teacher: Tensor, mask: Tensor | None, remedy: str = "") -> None:
    """Refuse attentions that cannot be compared head by head.

    Args:
        student: Should be `(B, H, L, L)`.
        teacher: The same shape.
        mask: `(B, L)` or None.
        remedy: What else helps against head counts that differ.

    Raises:
        ValueError: Names both sides' heads or shapes.
    """
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(
            f"student attentions {tuple(student.shape)} and teacher attentions {tuple(teacher.shape)} must be "
            "(B, H, L, L)"
        )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student has {student.shape[1]} attention heads and the teacher {teacher.shape[1]}, and they are "
            f"compared head by head: give the student {teacher.shape[1]} (student.num_heads){remedy}"
        )
    check_same_shape(student, teacher, "attentions")
    check_mask(mask, (student.shape[0], student.shape[2]))


def without_padding(attentions: Tensor, mask: Tensor | None) -> Tensor:
    """Return attentions `(B, H, L, L)` with zeros at masked queries and keys; the mask is `(B, L)`."""
    if mask is None:
        return attentions
    return attentions.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), 0.0)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    r"""Return KL(teacher || student) of attention rows in nats, averaged over heads and counted queries.

    Padding keys are left out on both sides. 0 log 0 is 0; below `SMALLEST` a probability counts as `SMALLEST`.

    Args:
        student: Probabilities `(B, H, L, L)`; rows sum to 1.
        teacher: The same; gets no gradient.
        mask: `(B, L)` bool, True = counts, as a query and as a key.
        reduction: `none` gives one value a query, `(B, L)`.

    Raises:
        ValueError: As `check_attentions`.
    """
    check_attentions(student, teacher, mask)
    student, teacher = without_padding(student, mask), without_padding(teacher.detach(), mask)
    gap = teacher.clamp(min=SMALLEST).log() - student.clamp(min=SMALLEST).log()
    return reduce((teacher * gap).sum(-1).mean(1), mask, reduction)


def relation_kl(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None, reduction: Reduction) -> Tensor:
    r"""Return KL(teacher || student) of relations in nats, averaged over heads and counted positions.

    A relation is the distribution :math:`\mathrm{softmax}(X X^\top / \sqrt{d})` of a head's queries, keys or values X
    `(L, d)`: how near each position is to each, whatever the width.

    Args:
        student: X of all heads side by side, `(B, L, D)`.
        teacher: The same for the teacher, `(B, L, D')`; gets no gradient.
        heads: Number of equal parts that each width is cut into, d wide.
        mask: `(B, L)` bool, True = counts, as a row and as a column.
        reduction: `none` gives one value a position, `(B, L)`.

    Raises:
        ValueError: Positions that differ, or a width that the heads do not divide.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student states {tuple(student.shape)} and teacher states {tuple(teacher.shape)} must agree in examples "
            "and positions"
        )
    check_mask(mask, student.shape[:2])
    student_log_probs = _relation(only_counted(student, mask), heads, mask, "student")
    teacher_log_probs = _relation(only_counted(teacher.detach(), mask), heads, mask, "teacher")
    values = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    return reduce(values.sum(-1).mean(1), mask, reduction)


def _relation(states: Tensor, heads: int, mask: Tensor | None, side: str) -> Tensor:
    """Return the log-probabilities `(B, heads, L, L)` of a relation."""
    width = states.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the {side}'s width {width}")
    parts = states.reshape(*states.shape[:-1], heads, width // heads).transpose(1, 2)
    scores = parts @ parts.mT / math.sqrt(width // heads)
    if mask is not None:  # the lowest number, not -inf: a row without any key stays finite
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, dim=-1)
