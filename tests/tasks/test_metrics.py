from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, pearsonr
from torch import Tensor
from torchmetrics import Metric

from kd_lightning.tasks import Classification
from kd_lightning.tasks.metrics import (
    Accuracy,
    Agreement,
    CalibrationError,
    CrossEntropy,
    MacroF1,
    Pearson,
    RootMeanSquare,
    TeacherStudentKL,
    agreement,
    expected_calibration_error,
    teacher_student_kl,
)
from kd_lightning.types import IGNORE


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits `(200, 5)`, correlated, and labels that the teacher mostly gets right."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(200, 5, generator=generator)
    student = teacher + 2 * torch.randn(200, 5, generator=generator)
    labels = (teacher + torch.randn(200, 5, generator=generator)).argmax(-1)
    return student, teacher, labels


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def test_kl_is_scipys_relative_entropy(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = logits
    expected = entropy(softmax(float64(teacher), axis=1), softmax(float64(student), axis=1), axis=1).mean()
    assert teacher_student_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert teacher_student_kl(student.double(), teacher.double()).item() == pytest.approx(expected, rel=1e-12)
    reverse = entropy(softmax(float64(student), axis=1), softmax(float64(teacher), axis=1), axis=1).mean()
    assert abs(expected - reverse) > 1e-3  # so that swapped arguments would have been noticed


def test_kl_is_zero_at_the_teacher_and_for_shifted_logits(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    _, teacher, _ = logits
    assert teacher_student_kl(teacher, teacher).item() == 0
    assert teacher_student_kl(teacher + 7, teacher).item() == pytest.approx(0, abs=1e-6)


def test_kl_of_extreme_logits_is_finite() -> None:
    teacher = torch.tensor([[1e4, 0.0, -torch.inf], [0.0, 1.0, -torch.inf]])
    student = torch.tensor([[0.0, 1e4, -torch.inf], [0.0, 1.0, -torch.inf]])
    assert teacher_student_kl(student, teacher).item() == pytest.approx(5000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher = (tensor.to(dtype) for tensor in logits[:2])
    result = teacher_student_kl(student, teacher)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(teacher_student_kl(student.double(), teacher.double()).item(), rel=1e-5)


def test_ignored_positions_count_nowhere(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = (tensor.clone().reshape(20, 10, *tensor.shape[1:]) for tensor in logits)
    labels[:, 7:] = IGNORE
    student[:, 7:] = torch.nan
    for function in (agreement, teacher_student_kl):
        expected = function(student[:, :7], teacher[:, :7])
        torch.testing.assert_close(function(student, teacher, labels), expected)
        assert torch.isnan(function(student, teacher, torch.full_like(labels, IGNORE)))


def test_shapes_are_checked(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = logits
    for function in (agreement, teacher_student_kl):
        with pytest.raises(ValueError, match="differ in shape"):
            function(student, teacher[:, :4])
        with pytest.raises(ValueError, match="do not fit"):
            function(student, teacher, labels[:3])


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al.'s definition, bin by bin."""
    probabilities = softmax(logits, axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.ceil(confidence * bins).astype(int) - 1
    total = 0.0
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def scores_of(student: Tensor, labels: Tensor, teacher: Tensor | None = None, size: int = 64) -> dict[str, float]:
    """The scores of a classification, batch by batch."""
    task = Classification(student.shape[1])
    found: dict[str, Tensor] = {}
    for scores, against in ((task.scores(), labels), (task.fidelity(), teacher)):
        if against is not None:
            for rows in torch.arange(len(student)).split(size):
                scores.update(student[rows], against[rows], {})
            found |= scores.compute()
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("size", [200, 64, 1])
def test_scores_are_numpys(logits: tuple[Tensor, Tensor, Tensor], size: int) -> None:
    student, teacher, labels = logits
    z, t, y = float64(student), float64(teacher), labels.numpy()
    scores = scores_of(student, labels, teacher, size)
    predicted = z.argmax(1)
    f1 = []
    for c in range(5):
        hits = np.sum((predicted == c) & (y == c))
        f1.append(2 * hits / (np.sum(predicted == c) + np.sum(y == c)))
    assert scores == pytest.approx(
        {
            "accuracy": np.mean(predicted == y),
            "macro_f1": np.mean(f1),
            "ece": calibration_error(z, y),
            "cross_entropy": -log_softmax(z, axis=1)[np.arange(200), y].mean(),
            "agreement": np.mean(predicted == t.argmax(1)),
            "kl_to_teacher": entropy(softmax(t, axis=1), softmax(z, axis=1), axis=1).mean(),
        },
        rel=1e-5,
    )


def test_calibration_error_of_logits_between_0_and_1() -> None:
    # torchmetrics takes such logits for probabilities
    logits, labels = torch.tensor([[0.9, 0.1], [0.2, 0.6]]), torch.tensor([0, 0])
    expected = calibration_error(float64(logits), labels.numpy())
    assert expected_calibration_error(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_a_confidence_of_1_is_in_the_last_of_15_bins() -> None:
    margins = torch.cat([torch.full((500,), 40.0), torch.full((500,), 3.5)])
    labels = (torch.arange(1000) < 60).long()
    logits = torch.stack([margins, torch.zeros(1000)], dim=1)
    assert torch.softmax(logits[0], 0)[0] == 1.0
    assert expected_calibration_error(logits, labels).item() == pytest.approx(0.0453, abs=5e-5)
    assert scores_of(logits, labels)["ece"] == pytest.approx(0.0453, abs=5e-5)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-60, 60), min_size=6, max_size=60), st.integers(1, 20), st.integers(0, 99))
def test_calibration_error_is_guos_for_any_logits(values: list[float], bins: int, seed: int) -> None:
    logits = torch.tensor(values[: len(values) // 3 * 3], dtype=torch.float64).view(-1, 3)
    labels = torch.randint(3, (len(logits),), generator=torch.Generator().manual_seed(seed))
    at = softmax(logits.numpy(), axis=1).max(1) * bins
    assume((np.abs(at - at.round()) > 1e-9)[at < bins].all())  # at an edge rounding decides
    expected = calibration_error(logits.numpy(), labels.numpy(), bins)
    assert expected_calibration_error(logits, labels, bins).item() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(row=st.integers(0, 199), column=st.integers(0, 4), of_teacher=st.booleans(), every=st.booleans())
def test_nan_in_is_nan_out_of_every_score(row: int, column: int, of_teacher: bool, every: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 200, 5, generator=generator)
    labels = torch.arange(200) % 5
    damaged = teacher if of_teacher else student
    damaged[slice(None) if every else row, column] = torch.nan
    assert math.isnan(expected_calibration_error(student, labels)) is not of_teacher
    streamed: list[tuple[Metric, Tensor]] = [
        *((metric, labels) for metric in (Accuracy(5), MacroF1(5), CalibrationError(), CrossEntropy())),
        (Agreement(), teacher), (TeacherStudentKL(), teacher),
    ]  # fmt: skip
    for metric, against in streamed:
        for rows in torch.arange(200).split(64):
            metric.update(student[rows], against[rows])
        assert math.isnan(metric.compute()) == (against is teacher or not of_teacher)
        metric.reset()
        metric.update(torch.eye(5), torch.eye(5) if against is teacher else torch.arange(5))
        assert not math.isnan(metric.compute())


def test_unlabelled_nan_counts_nowhere(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, labels = logits
    expected = scores_of(student[:100], labels[:100])
    student, labels = student.clone(), labels.clone()
    student[100:], labels[100:] = torch.nan, IGNORE
    assert scores_of(student, labels) == pytest.approx(expected)


def test_unlabelled_examples_count_in_fidelity_only(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = logits
    partly = labels.clone()
    partly[100:] = IGNORE
    scores = scores_of(student, partly, teacher, 50)
    labelled = scores_of(student[:100], labels[:100], size=50)
    assert {name: scores[name] for name in labelled} == labelled
    assert scores["agreement"] == agreement(student, teacher).item()
    nothing = scores_of(student, torch.full_like(labels, IGNORE), teacher)
    assert all(math.isnan(nothing[name]) for name in labelled)
    assert nothing["agreement"] == scores["agreement"]


@pytest.mark.parametrize(
    ("metric", "function"), [(Agreement, agreement), (TeacherStudentKL, teacher_student_kl)], ids=["agreement", "kl"]
)
def test_metrics_accumulate_over_uneven_batches_and_processes(
    metric: type[Agreement] | type[TeacherStudentKL], function: object, logits: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, labels = logits
    labels = labels.clone()
    labels[::7] = IGNORE
    expected = function(student, teacher, labels)
    ranks = [metric(), metric()]
    for number, rows in enumerate(torch.arange(200).split([64, 3, 100, 33])):
        ranks[number % 2].update(student[rows], teacher[rows], labels[rows])
    merged = metric()
    for name, reduction in merged._reductions.items():  # what torchmetrics does after gathering
        setattr(merged, name, reduction(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    torch.testing.assert_close(merged.compute(), expected)
    merged.reset()
    assert merged.count == 0


def test_correlation_and_difference_of_scores_are_scipys_in_batches_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = 40 + torch.randn(100, generator=generator)  # far from zero, where sums of squares lose digits
    scores = 0.5 * labels + 0.1 * torch.randn(100, generator=generator)
    for sizes in ([100], [1, 30, 69]):
        correlation, difference = Pearson(), RootMeanSquare()
        for rows in torch.arange(100).split(sizes):
            correlation.update(scores[rows], labels[rows])
            difference.update(scores[rows], labels[rows])
        assert float(correlation.compute()) == pytest.approx(
            pearsonr(scores.double(), labels.double()).statistic, abs=1e-10
        )
        expected = (scores.double() - labels.double()).square().mean().sqrt()
        assert float(difference.compute()) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("scores", "labels"), [([0.0] * 3, [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.1] * 3)])
def test_a_constant_has_no_correlation(scores: list[float], labels: list[float]) -> None:
    metric = Pearson()
    metric.update(torch.tensor(scores), torch.tensor(labels))
    assert float(metric.compute()) == 0


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_has_no_correlation_and_none_is_nan(value: float) -> None:
    metric = Pearson()
    metric.update(torch.tensor([1.0, value, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert math.isnan(metric.compute())
    metric.reset()
    metric.update(torch.zeros(0), torch.zeros(0))
    assert math.isnan(metric.compute())


def test_sums_stay_wide_where_a_trainer_narrows_all_it_holds() -> None:
    scores = Classification(3).scores().to(torch.bfloat16)
    for metric in scores.metrics.values():
        states = [getattr(metric, name) for name in metric._defaults]
        assert {state.dtype for state in states} <= {torch.float64, torch.int64}
    for _ in range(1000):
        scores.update(torch.eye(3)[:1], torch.tensor([0]), {})
    assert float(scores.compute()["accuracy"]) == 1.0
    assert float(scores.metrics["cross_entropy"].count) == 1000
