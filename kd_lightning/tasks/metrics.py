"""How good a model is, and how near it is to its teacher.

Each measure of fidelity is a pure function beside a `torchmetrics` class that accumulates it over batches and
processes; what torchmetrics already has (accuracy, F1) is called, not rewritten. A prediction that counts and is NaN
makes every score NaN: its largest entry is no class.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from kd_lightning.types import IGNORE, is_labelled


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
    return _unless(invalid, equal / count)


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
    known = labels != IGNORE
    confidence, predicted = F.softmax(_precise(logits[known]), dim=-1).max(dim=-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=logits.device)[1:-1]
    excess = confidence - (predicted == labels[known]).to(confidence.dtype)
    by_bin = confidence.new_zeros(bins).index_add_(0, torch.bucketize(confidence, edges), excess)
    return by_bin.abs().sum() / len(confidence)


def distillation_ratio(teacher: float, baseline: float, distilled: float) -> float:
    r"""Part of the gap between student and teacher that distillation closed.

    $$ (S_{kd} - S) / (T - S) $$ for the scores of the teacher, of the student from labels and of the distilled student.
    1 is the teacher reached, 0 is no gain, negative is harm.

    Returns:
        The ratio. nan when the teacher is no better than the baseline (T <= S): there is no gap to close, and dividing
        by it would call a distilled student that got worse a success. nan too when a score is not finite.

    >>> round(distillation_ratio(teacher=0.846, baseline=0.759, distilled=0.824), 3)
    0.747
    >>> distillation_ratio(teacher=0.70, baseline=0.75, distilled=0.72)
    nan
    """
    gap = teacher - baseline
    if not gap > 0 or not math.isfinite(gap) or not math.isfinite(distilled):
        return math.nan
    return (distilled - baseline) / gap


def evaluate_logits(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, *, num_classes: int | None = None
) -> dict[str, float]:
    """Every score of the report, from the logits of a whole split.

    Args:
        logits: `(N, C)`.
        labels: `(N,)`; examples labelled `IGNORE` count in agreement and KL only.
        teacher_logits: `(N, C)`; None leaves `agreement` and `kl_to_teacher` out.
        num_classes: C, when it should be checked against the logits.

    Returns:
        `accuracy`, `macro_f1` (over the classes that occur among labels or predictions), `ece`, `cross_entropy` (nats),
        and with a teacher `agreement` and `kl_to_teacher`. A score without a single example to count is nan, and so is
        one of logits that are.

    Raises:
        ValueError: If the shapes do not fit each other or `num_classes`.

    >>> scores = evaluate_logits(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]), num_classes=2)
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'accuracy': 0.5, 'macro_f1': 0.333, 'ece': 0.381, 'cross_entropy': 1.127}
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}; "
            "flatten token-level outputs first"
        )
    classes = logits.shape[1]
    if num_classes is not None and num_classes != classes:
        raise ValueError(f"the logits have {classes} classes, the data has {num_classes}")
    known = labels != IGNORE
    scores = dict.fromkeys(("accuracy", "macro_f1", "ece", "cross_entropy"), math.nan)
    if known.any() and not logits[known].isnan().any():
        z, y = _precise(logits[known]), labels[known]
        predicted = z.argmax(dim=-1)
        scores = {
            "accuracy": float(multiclass_accuracy(predicted, y, num_classes=classes, average="micro")),
            "macro_f1": float(multiclass_f1_score(predicted, y, num_classes=classes, average="macro")),
            "ece": float(expected_calibration_error(z, y)),
            "cross_entropy": float(F.cross_entropy(z, y)),
        }
    if teacher_logits is not None:
        scores["agreement"] = float(agreement(logits, teacher_logits))
        scores["kl_to_teacher"] = float(teacher_student_kl(logits, teacher_logits))
    return scores


def evaluate_scores(scores: Tensor, labels: Tensor, teacher_scores: Tensor | None = None) -> dict[str, float]:
    r"""Every score of a regression, from what is said of a whole split.

    With predictions s and labels y of the N examples that have one: Pearson's correlation
    $$ \frac{\sum_i (s_i - \bar s)(y_i - \bar y)}{\sqrt{\sum_i (s_i - \bar s)^2 \sum_i (y_i - \bar y)^2}} $$
    which is 0 here where either is constant, and $$ \mathrm{RMSE} = \sqrt{\frac{1}{N} \sum_i (s_i - y_i)^2} $$ in the
    unit of the labels.

    Args:
        scores: `(N,)` or `(N, 1)`.
        labels: `(N,)`; NaN and `IGNORE` are no labels.
        teacher_scores: As `scores`; None leaves `rmse_to_teacher` out.

    Returns:
        `pearson`, `rmse` and with a teacher `rmse_to_teacher`. Without a single label the first two are nan.

    Raises:
        ValueError: If the shapes do not fit.

    >>> found = evaluate_scores(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0]))
    >>> {name: round(value, 3) for name, value in found.items()}
    {'pearson': 1.0, 'rmse': 0.816}
    """
    said, known = _precise(scores).reshape(-1), is_labelled(labels)
    if labels.shape != said.shape:
        raise ValueError(f"expected scores (N,) and labels (N,), got {tuple(scores.shape)} and {tuple(labels.shape)}")
    found = {"pearson": math.nan, "rmse": math.nan}
    if known.any():
        s, y = said[known].double(), labels[known].double()
        a, b = s - s.mean(), y - y.mean()
        spread = float((a.square().sum() * b.square().sum()).sqrt())
        found = {"pearson": float((a * b).sum()) / spread if spread else 0.0, "rmse": float(_rms(s - y))}
        if not math.isfinite(found["rmse"]):
            found["pearson"] = math.nan
    if teacher_scores is not None:
        found["rmse_to_teacher"] = float(_rms(said - _precise(teacher_scores).reshape(-1)))
    return found


def _rms(differences: Tensor) -> Tensor:
    return differences.square().mean().sqrt()


class _OfNumbers(MulticlassStatScores):
    """A metric of predicted classes that is nan where a row of logits that counts has a nan."""

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
        return _unless(self.invalid, super().compute())


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
        return _unless(self.invalid, self.equal / self.count)


class TeacherStudentKL(Metric):
    """`teacher_student_kl` accumulated over batches and processes: the mean over examples, not over batches.

    >>> metric = TeacherStudentKL()
    >>> metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    >>> metric.compute()
    tensor(0.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    divergence: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("divergence", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch: logits `(..., C)` of both and, to leave padding out, labels `(...)`."""
        divergence, count = _kl_sums(student_logits, teacher_logits, labels)
        self.divergence += divergence.to(self.divergence.dtype)
        self.count += count

    def compute(self) -> Tensor:
        """Return the mean over everything added so far."""
        return self.divergence / self.count


def _unless(invalid: Tensor, score: Tensor) -> Tensor:
    """Return the score, or nan where anything that counted is not valid."""
    return torch.where(invalid > 0, torch.nan, score)


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
    log_student = F.log_softmax(_precise(student_logits), dim=-1)
    log_teacher = F.log_softmax(_precise(teacher_logits), dim=-1)
    p_teacher = log_teacher.exp()
    # 0 * (-inf) is nan, but the limit of p log p is 0; a nan of either side stays one
    terms = torch.where((p_teacher == 0) & ~log_student.isnan(), 0, p_teacher * (log_teacher - log_student))
    # `where` rather than a product, so that a nan at a padded position does not spread
    return torch.where(counted, terms.sum(dim=-1), 0).sum(), counted.sum()
