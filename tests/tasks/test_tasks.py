"""What networks predict: a class, a score, or both; against scikit-learn's kind of arithmetic in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr
from torch import Tensor

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.runtime.errors import KDError
from kd_lightning.tasks import Classification, MultiTask, Regression, Scores, Task, task_of
from kd_lightning.tasks.metrics import evaluate_logits, evaluate_scores
from kd_lightning.tasks.predictions import Answers
from kd_lightning.types import Batch, ModelOutput

N = 60
WHOLE = MultiTask({"side": Classification(2), "score": Regression(), "kind": Classification(3)}, {"kind": 2.0})


@pytest.fixture
def said() -> Answers:
    generator = torch.Generator().manual_seed(0)
    task = torch.arange(N) % 3
    labels = torch.where(
        task == 1, torch.randn(N, generator=generator), (torch.arange(N) // 3) % (task + 1).clamp(min=2)
    )
    labels[1] = torch.nan  # a score without a label
    return Answers(torch.arange(N), torch.randn(N, 6, generator=generator), labels, task)


def streamed(scores: Scores, said: Answers, against: Tensor, sizes: list[int]) -> dict[str, float]:
    """Give the scores the rows batch by batch."""
    start, metrics = 0, {}
    for size in sizes:
        rows = slice(start, start + size)
        batch: Batch = {} if said.task is None else {"task": said.task[rows]}
        metrics = scores(said.logits[rows], against[rows], batch)
        start += size
    assert start == len(said.labels)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def test_several_tasks_are_scored_each_on_its_rows_and_columns(said: Answers) -> None:
    teacher = said.logits.flip(0)
    found = WHOLE.evaluate(said, teacher)
    rows = said.task == 2
    alone = evaluate_logits(said.logits[rows, 3:], said.labels[rows].long(), teacher[rows, 3:])
    assert {name.removeprefix("kind/"): value for name, value in found.items() if name.startswith("kind/")} == alone
    rows = said.task == 1
    known = rows & ~said.labels.isnan()
    assert found["score/pearson"] == pytest.approx(pearsonr(said.logits[known, 2], said.labels[known]).statistic)
    difference = (said.logits[rows, 2] - teacher[rows, 2]).numpy()
    assert found["score/rmse_to_teacher"] == pytest.approx(float(np.sqrt((difference**2).mean())), rel=1e-6)
    mains = [found["side/accuracy"], found["score/pearson"], found["kind/accuracy"]]
    assert found["average"] == pytest.approx(sum(mains) / 3)
    assert WHOLE.main == "average"
    assert WHOLE.correct(said) == []
    assert WHOLE.guess(said.labels) is None


@pytest.mark.parametrize("sizes", [[N], [7, 1, 2, 50]])
def test_streamed_scores_are_those_of_the_whole_split(said: Answers, sizes: list[int]) -> None:
    """Batches of one or two rows lack tasks."""
    teacher = said.logits.flip(0)
    whole = WHOLE.evaluate(said, teacher)
    found = streamed(WHOLE.scores(), said, said.labels, sizes)
    found |= streamed(WHOLE.fidelity(), said, teacher, sizes)
    assert set(found) == {
        "average", "side/accuracy", "side/macro_f1", "side/agreement", "side/kl_to_teacher", "kind/accuracy",
        "kind/macro_f1", "kind/agreement", "kind/kl_to_teacher", "score/pearson", "score/rmse", "score/rmse_to_teacher",
    }  # fmt: skip
    for name, value in found.items():
        assert value == pytest.approx(whole[name], rel=1e-5), name


def test_the_loss_from_labels_is_weighted_and_each_example_counts_alike(said: Answers) -> None:
    assert said.task is not None
    batch: Batch = {"task": said.task, "labels": said.labels}
    output = ModelOutput(said.logits)
    rows = [said.task == k for k in range(3)]
    known = rows[1] & ~said.labels.isnan()
    expected = (
        F.cross_entropy(said.logits[rows[0], :2], said.labels[rows[0]].long())
        + F.mse_loss(said.logits[known, 2], said.labels[known])
        + 2 * F.cross_entropy(said.logits[rows[2], 3:], said.labels[rows[2]].long())
    ) / 3
    torch.testing.assert_close(WHOLE.loss()(output, output, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_regression(dtype: torch.dtype) -> None:
    task = Regression()
    labels = torch.tensor([1.0, -2.0, torch.nan, 0.5, -100.0])
    said = Answers(torch.arange(5), torch.tensor([[0.5], [-1.0], [9.0], [1.0], [9.0]]).to(dtype), labels)
    known = [0, 1, 3]
    expected = {
        "pearson": pearsonr([0.5, -1.0, 1.0], labels[known]).statistic, "rmse": float(np.sqrt((0.25 + 1 + 0.25) / 3)),
    }  # fmt: skip
    assert task.evaluate(said) == pytest.approx(expected, rel=1e-6)
    assert streamed(task.scores(), said, labels, [2, 1, 2]) == pytest.approx(expected, rel=1e-5)
    output = ModelOutput(said.logits)
    torch.testing.assert_close(task.loss()(output, output, {"labels": labels}), torch.tensor(0.5))


def test_a_constant_has_no_correlation_and_what_is_not_finite_is_said() -> None:
    labels = torch.tensor([1.0, 2.0, 3.0])
    assert evaluate_scores(torch.zeros(3), labels)["pearson"] == 0
    assert evaluate_scores(labels, torch.ones(3))["pearson"] == 0
    assert all(np.isnan(list(evaluate_scores(torch.full((3, 1), torch.inf), labels).values())[:1]))
    assert all(np.isnan(list(evaluate_scores(labels, torch.full((3,), torch.nan)).values())))
    with pytest.raises(ValueError, match=r"expected scores \(N,\) and labels \(N,\), got \(3, 2\) and \(3,\)"):
        evaluate_scores(torch.zeros(3, 2), labels)


@pytest.mark.parametrize("of_teacher", [False, True])
def test_a_nan_prediction_makes_every_score_of_its_task_nan(said: Answers, of_teacher: bool) -> None:
    teacher = said.logits.flip(0).clone()
    for row in (3, 4, 5):  # one of each task
        (teacher if of_teacher else said.logits)[row] = torch.nan
    whole = WHOLE.evaluate(said, teacher)
    found = streamed(WHOLE.scores(), said, said.labels, [7, 1, 2, 50])
    found |= streamed(WHOLE.fidelity(), said, teacher, [7, 1, 2, 50])
    near = ("agreement", "kl_to_teacher", "rmse_to_teacher")
    for scores in (whole, found):
        assert {name for name, value in scores.items() if np.isnan(value)} == {
            name for name in scores if not of_teacher or name.endswith(near)
        }


def test_a_teachers_score_of_minus_100_is_a_score() -> None:
    task, scores = Regression(), torch.tensor([[0.0], [1.0]])
    teacher = torch.tensor([[-100.0], [1.0]])
    said = Answers(torch.arange(2), scores, torch.zeros(2))
    found = streamed(task.fidelity(), said, teacher, [2])
    assert found["rmse_to_teacher"] == pytest.approx(task.evaluate(said, teacher)["rmse_to_teacher"]) == 100 / 2**0.5


def test_a_nan_prediction_is_read_as_nothing() -> None:
    logits = torch.tensor([torch.nan, 0.0, 1.0])
    with pytest.raises(KDError, match="the network predicts NaN"):
        Classification(3).read(logits, ["a", "b", "c"])
    with pytest.raises(KDError, match="the network predicts NaN"):
        Regression().read(logits[:1], ["score"])
    assert Classification(3).correct(Answers(torch.arange(1), logits.view(1, 3), torch.tensor([0]))) == [False]


def test_a_classification() -> None:
    task = Classification(3)
    said = Answers(torch.arange(3), torch.eye(3), torch.tensor([0, 2, 2]))
    assert task.correct(said) == [True, False, True]
    assert task.guess(said.labels) == pytest.approx(2 / 3)
    assert isinstance(task.loss(), CrossEntropyLoss)
    assert task.evaluate(said)["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("task", [Classification(4), Regression(), WHOLE], ids=lambda task: type(task).__name__)
def test_a_description_makes_the_task_again(task: Task) -> None:
    again = task_of(task.description)
    assert type(again) is type(task)
    assert again.outputs == task.outputs
    assert again.description == task.description


def test_answers_are_read_in_plain_values() -> None:
    names = ["side: left", "side: right", "score: rating", "kind: a", "kind: b", "kind: c"]
    found: dict[str, Any] = WHOLE.read(torch.tensor([0.0, 0.0, -1.25, 0.0, 9.0, 0.0]), names)
    assert found["side"]["probabilities"] == {"left": 0.5, "right": 0.5}
    assert found["score"] == {"score": -1.25}
    assert found["kind"]["label"] == "b"
