"""How good a model is, and how near it is to its teacher.

Every score is a `torchmetrics` class whose states are sums: over batches, over processes, and over the parts of a split
from which the intervals of scores are resampled. What torchmetrics already has (accuracy, F1) is called, not rewritten.
A prediction that counts and is NaN makes every score NaN: its largest entry is no class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores

from kd_lightning.types import IGNORE


def agreement(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Share of positions where student and teacher predict the same class.

    $$ \frac{1}{N} \sum_i [\arg\max z^s_i = \arg\max z^t_i] $$

    Args:
        student_logits: `(..., C)`.
        teacher_logits: `(..., C)`, the same shape.
        labels: `(...)`; positions labelled `IGNORE` (padding) are not counted. None counts every position.

    Returns:
        Scalar in [0, 1]; nan when there is nothing to count, or a logit that counts is.

    Raises:
        ValueError: If the shapes differ.

    >>> student = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [1.0, 0.0]])
    >>> teacher = torch.tensor([[5.0, 1.0], [0.0, 1.0], [0.0, 1.0], [9.0, 0.0]])
    >>> agreement(student, teacher)
    tensor(0.7500)
    """
    equal, count, invalid = _agreement_sums(student_logits, teacher_logits, labels)
    return _unless(invalid > 0, equal / count)


def teacher_student_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Mean Kullback-Leibler divergence from teacher to student, in nats, at temperature 1.

    $$ \frac{1}{N} \sum_i \sum_c p^t_{ic} (\log p^t_{ic} - \log p^s_{ic}), \quad p = \mathrm{softmax}(z) $$

    Computed in log space, in float32 (float64 when both inputs are). A class to which the teacher gives no probability
    adds nothing.

    Args:
        student_logits: `(..., C)`.
        teacher_logits: `(..., C)`, the same shape.
        labels: `(...)`; positions labelled `IGNORE` (padding) are not counted. None counts every position.

    Returns:
        Scalar, 0 where the two distributions are equal; nan when there is nothing to count, or a logit that counts is.

    Raises:
        ValueError: If the shapes differ.

    >>> teacher = torch.log(torch.tensor([[0.5, 0.5]]))
    >>> student = torch.log(torch.tensor([[0.25, 0.75]]))
    >>> teacher_student_kl(student, teacher)  # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
    tensor(0.1438)
    """
    divergence, count = _kl_sums(student_logits, teacher_logits, labels)
    return divergence / count


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    r"""Expected calibration error: how far confidence is from accuracy (Guo et al. 2017, arXiv 1706.04599).

    $$ \sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{confidence}_b| $$ over M = `bins` equal bins
    ((b - 1) / M, b / M] of the predicted class's probability. (torchmetrics has one more, of confidence 1.)

    Args:
        logits: `(N, C)`; turned into probabilities here.
        labels: `(N,)`; `IGNORE` is not counted.
        bins: Number of bins.

    Returns:
        Scalar in [0, 1]; nan when there is nothing to count, or a logit that counts is.

    >>> logits = torch.log(torch.tensor([[0.8, 0.2], [0.8, 0.2]]))
    >>> expected_calibration_error(logits, torch.tensor([0, 1]))  # confidence 0.8, accuracy 0.5
    tensor(0.3000)
    """
    by_bin, count = _excess_by_bin(logits, labels, bins)
    return (by_bin.abs().sum() / count.sum()).to(_precise(logits).dtype)


class Sums(Metric):
    """A metric with float64 sums as states, which add up over batches, processes and subsets.

    Args:
        names: Of the states.
        size: Of each; a number where it is empty.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, *names: str, size: tuple[int, ...] = ()) -> None:
        super().__init__()
        for name in names:
            self.add_state(name, default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Move the states and keep float64 under reduced precision (not on Apple's GPUs)."""

        def moved(x: Tensor) -> Tensor:
            device = fn(torch.zeros((), device=x.device)).device
            return x.to(device, torch.float32 if device.type == "mps" else x.dtype)

        return super()._apply(moved, exclude_state)


class _OfNumbers(MulticlassStatScores):
    """A metric of predicted classes; NaN if nothing counts or a counted row of logits has a NaN."""

    invalid: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_state("invalid", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: logits `(B, C)` and labels `(B,)`."""
        self.invalid += (preds.isnan().any(-1) & (target != IGNORE)).sum()
        super().update(preds, target)

    def compute(self) -> Tensor:
        """Return the score over everything added so far."""
        counted = torch.as_tensor(self.tp).sum() + torch.as_tensor(self.fn).sum()
        return _unless((self.invalid > 0) | (counted == 0), super().compute())


class Accuracy(_OfNumbers, MulticlassAccuracy):
    """Share of labelled examples whose largest logit is the label's.

    >>> metric = Accuracy(2)
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), torch.tensor([1, 1]))
    >>> metric.compute()
    tensor(nan)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="micro", ignore_index=IGNORE)


class MacroF1(_OfNumbers, MulticlassF1Score):
    """F1, averaged over the classes that occur among labels or predictions.

    >>> metric = MacroF1(2)
    >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), torch.tensor([1, -100]))
    >>> metric.compute()
    tensor(1.)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="macro", ignore_index=IGNORE)


class Agreement(Metric):
    """`agreement` accumulated over batches and processes.

    >>> metric = Agreement()
    >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    >>> metric.compute()
    tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    equal: Tensor
    count: Tensor
    invalid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("equal", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("invalid", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch: logits `(..., C)` of both and, to leave padding out, labels `(...)`."""
        equal, count, invalid = _agreement_sums(student_logits, teacher_logits, labels)
        self.equal += equal
        self.count += count
        self.invalid += invalid

    def compute(self) -> Tensor:
        """Return the share over everything added so far."""
        return _unless(self.invalid > 0, self.equal / self.count)


class Mean(Sums):
    """The mean of a value over all that count; a subclass's `update` adds them."""

    higher_is_better = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__("total", "count")

    def add(self, values: Tensor, count: Tensor | int) -> None:
        """Add values, and over how many they are."""
        self.total += values.sum(dtype=self.total.dtype)
        self.count += count

    def compute(self) -> Tensor:
        """Return the mean over everything added so far."""
        return (self.total / self.count).float()


class TeacherStudentKL(Mean):
    """`teacher_student_kl` over batches and processes: the mean over examples, not batches.

    >>> metric = TeacherStudentKL()
    >>> metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    >>> metric.compute()
    tensor(0.)
    """

    def update(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch: logits `(..., C)` of both and, to leave padding out, labels `(...)`."""
        self.add(*_kl_sums(student_logits, teacher_logits, labels))


class CrossEntropy(Mean):
    """Mean cross-entropy of labels under softmax(logits), in nats, over all labelled examples.

    >>> metric = CrossEntropy()
    >>> metric.update(torch.zeros(2, 4), torch.tensor([1, -100]))
    >>> metric.compute()  # log 4
    tensor(1.3863)
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: logits `(B, C)` and labels `(B,)`."""
        known = target != IGNORE
        self.add(F.cross_entropy(_precise(preds[known]), target[known], reduction="none"), known.sum())


class CalibrationError(Sums):
    """`expected_calibration_error` accumulated over batches and processes.

    >>> metric = CalibrationError()
    >>> metric.update(torch.log(torch.tensor([[0.8, 0.2]])), torch.tensor([0]))
    >>> metric.update(torch.log(torch.tensor([[0.8, 0.2]])), torch.tensor([1]))
    >>> metric.compute()  # confidence 0.8, accuracy 0.5
    tensor(0.3000)
    """

    higher_is_better = False

    excess: Tensor
    count: Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__("excess", "count", size=(bins,))

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: logits `(B, C)` and labels `(B,)`."""
        excess, count = _excess_by_bin(preds, target, len(self.excess))
        self.excess += excess
        self.count += count

    def compute(self) -> Tensor:
        """Return the error over everything added so far."""
        return (self.excess.abs().sum() / self.count.sum()).float()


class Pearson(Sums):
    r"""Pearson's correlation of predictions s and labels y over all batches.

    $$ \frac{\sum_i (s_i - \bar s)(y_i - \bar y)}{\sqrt{\sum_i (s_i - \bar s)^2 \sum_i (y_i - \bar y)^2}} $$

    which is 0 here where either is constant to rounding.

    >>> metric = Pearson()
    >>> metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0]))
    >>> round(float(metric.compute()), 6)
    1.0
    """

    higher_is_better = True

    moments: Tensor

    def __init__(self) -> None:
        super().__init__("moments", size=(6,))

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: predictions `(B,)` and labels `(B,)`."""
        s, y = preds.to(self.moments.dtype), target.to(self.moments.dtype)
        self.moments += torch.stack([x.sum() for x in (torch.ones_like(s), s, y, s * s, y * y, s * y)])

    def compute(self) -> Tensor:
        """Return the correlation over everything added so far."""
        n, s, y, ss, yy, sy = self.moments
        spreads = torch.stack([n * ss - s * s, n * yy - y * y])
        rounding = 1e-12 * n * torch.stack([ss, yy])
        value = (n * sy - s * y) / spreads.prod().sqrt()
        constant = (spreads <= rounding).any() & self.moments.isfinite().all() & (n > 0)
        return torch.where(constant, 0.0, value)


class RootMeanSquare(Mean):
    """Root of the mean squared difference over all batches, in the unit of what is predicted.

    >>> metric = RootMeanSquare()
    >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]))
    >>> metric.compute()
    tensor(1., dtype=torch.float64)
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: predictions `(B,)`, and labels or a teacher's predictions `(B,)`."""
        self.add((preds.to(self.total.dtype) - target.to(self.total.dtype)).square(), len(preds))

    def compute(self) -> Tensor:
        """Return the root over everything added so far."""
        return (self.total / self.count).sqrt()


def _unless(invalid: Tensor, score: Tensor) -> Tensor:
    """Return the score, or nan where it is not valid."""
    return torch.where(invalid, torch.nan, score)


def _precise(logits: Tensor) -> Tensor:
    """Return the logits in float32, or in float64 where they already are."""
    return logits.detach() if logits.dtype == torch.float64 else logits.detach().float()


def _counted(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
    """Check the shapes and return a boolean `(...)`, True where a position counts."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits of student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} differ in shape"
        )
    positions = student_logits.shape[:-1]
    if labels is None:
        return torch.ones(positions, dtype=torch.bool, device=student_logits.device)
    if labels.shape != positions:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}")
    return labels != IGNORE


def _agreement_sums(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many counted positions agree, how many there are, and how many have a nan on either side."""
    counted = _counted(student_logits, teacher_logits, labels)
    equal = student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)
    invalid = student_logits.isnan().any(dim=-1) | teacher_logits.isnan().any(dim=-1)
    return (equal & counted).sum(), counted.sum(), (invalid & counted).sum()


def _kl_sums(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the divergence summed over counted positions, and how many there are."""
    counted = _counted(student_logits, teacher_logits, labels)
    # `where` rather than a product, so that a nan at a padded position does not spread
    return torch.where(counted, kl_of_rows(student_logits, teacher_logits), 0).sum(), counted.sum()


def kl_of_rows(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the divergence of each row of logits `(..., C)`, `(...)`, as `teacher_student_kl` has it."""
    log_student = F.log_softmax(_precise(student_logits), dim=-1)
    log_teacher = F.log_softmax(_precise(teacher_logits), dim=-1)
    p_teacher = log_teacher.exp()
    # 0 * (-inf) is nan, but the limit of p log p is 0; a nan of either side stays one
    terms = torch.where((p_teacher == 0) & ~log_student.isnan(), 0, p_teacher * (log_teacher - log_student))
    return terms.sum(dim=-1)


def _excess_by_bin(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return each confidence bin's summed excess of confidence over accuracy, and its count."""
    known = labels != IGNORE
    confidence, predicted = F.softmax(_precise(logits[known]), dim=-1).max(dim=-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=logits.device)[1:-1]
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    excess = confidence.to(wide) - (predicted == labels[known]).to(wide)
    places, empty = torch.bucketize(confidence, edges), excess.new_zeros(bins)
    return empty.index_add(0, places, excess), empty.index_add(0, places, torch.ones_like(excess))
