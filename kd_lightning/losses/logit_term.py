"""Base class and helpers of the losses on softened distributions.

Their functions reduce what is computed here, so that each file holds only its formula.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import (
    Averages,
    Scheduled,
    Term,
    check_mask,
    check_positive,
    check_same_shape,
    compared_logits,
    only_counted,
)
from kd_lightning.types import IGNORE, Batch, ModelOutput


class LogitTerm(Term):
    """A term that compares logits class by class at a temperature; subclasses implement `compare`.

    Args:
        temperature: T > 0, or a schedule over training progress.
        classes: Compare only the first `classes` logits of each side; see `compared_logits`.
    """

    averages: Averages = "logits"

    def __init__(self, temperature: Scheduled = 1.0, classes: int | None = None) -> None:
        super().__init__()
        self.temperature, self.classes = temperature, classes

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the loss, averaged over the examples or positions that count.

        Raises:
            ValueError: As `compared_logits`, or what the loss's function refuses.
        """
        logits_s, logits_t, mask = compared_logits(student, teacher, batch, self.classes)
        return self.compare(logits_s, logits_t, mask, batch)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None, batch: Batch) -> Tensor:
        """Return the loss of logits of as many classes, a scalar.

        Args:
            student: `(B, C)` or `(B, L, V)`.
            teacher: The same shape.
            mask: `(B, L)`, True = counts; None for `(B, C)`.
            batch: For losses that read the labels, one for each row.
        """


def softened(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return both sides' log softmax(z / T), the teacher's without a graph; uniform where `mask` is False.

    Raises:
        ValueError: Shapes that differ, a mask of another shape, or a temperature that is not positive and finite.
    """
    check_same_shape(student_logits, teacher_logits)
    check_mask(mask, student_logits.shape[:-1])
    check_positive("temperature", temperature)
    student, teacher = (only_counted(z, mask) / temperature for z in (student_logits, teacher_logits.detach()))
    return F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, summed over the last axis, of log probabilities."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return log(share p + (1 - share) q), for a share in [0, 1)."""
    return torch.logaddexp(log_p + (math.log(share) if share else -math.inf), log_q + math.log1p(-share))


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Return beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, for beta in (0, 1)."""
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def skewed(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return KL(p || share p + (1 - share) q), for a share in [0, 1)."""
    return kl(log_p, log_mixture(log_p, log_q, share))


def half_distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the total variation distance, half the sum of |p - q|."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that are not one class for each row of logits.

    On a GPU, labels out of range are left to torch's kernels, which fail on them: a check would synchronise.

    Raises:
        ValueError: Names both shapes, or states that the labels are not classes.
    """
    if labels.is_floating_point():
        raise ValueError(
            "labels are scores, and this loss needs classes: use kd_lightning.losses.regression; of pairs of texts "
            "distillation=embed_distill or another for embeddings, of a query's documents distillation=listwise_kl"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} must have the shape {tuple(logits.shape[:-1])} of the logits")
    classes = logits.shape[-1]
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} does not exist: the logits have {classes} classes, labelled 0 to "
                f"{classes - 1}, and {IGNORE} means no label"
            )


def labelled(labels: Tensor, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return labels with a class in place of -100, and the mask of examples with a label.

    Raises:
        ValueError: Labels of another shape, or fewer than two classes.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)}: a label's class and others need two classes or more")
    check_labels(labels, logits)
    check_mask(mask, labels.shape)
    known = labels != IGNORE
    return labels.masked_fill(~known, 0), known if mask is None else known & mask


def at_label(values: Tensor, labels: Tensor) -> Tensor:
    """Return each row's entry at its label: `(..., C)` and `(...)` to `(...)`."""
    return values.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def is_label(labels: Tensor, classes: int) -> Tensor:
    """Return `(..., C)` bool, True at each row's label."""
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)


def log_probs_of_others(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log softmax over the classes other than the label's, and 0 at the label."""
    label = is_label(labels, logits.shape[-1])
    return F.log_softmax(logits.masked_fill(label, -math.inf), dim=-1).masked_fill(label, 0.0)
