"""What networks predict: a class, a score, or both; against scikit-learn's kind of arithmetic in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr
from torch import Tensor
from torchmetrics import MaxMetric

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.runtime.errors import KDError
from kd_lightning.tasks import Classification, MultiTask, Regression, Scores, Task, task_of
from kd_lightning.types import Batch, ModelOutput

N = 60
OF_CLASSES = ("accuracy", "macro_f1", "ece", "cross_entropy", "agreement", "kl_to_teacher")
WHOLE = MultiTask({"side": Classification(2), "score": Regression(), "kind": Classification(3)}, {"kind": 2.0})


class Split(NamedTuple):
    """Logits of all tasks' columns, labels, and which task each example is of."""

    logits: Tensor
    labels: Tensor
    task: Tensor


@pytest.fixture
def split() -> Split:
    generator = torch.Generator().manual_seed(0)
    task = torch.arange(N) % 3
    labels = torch.where(
        task == 1, torch.randn(N, generator=generator), (torch.arange(N) // 3) % (task + 1).clamp(min=2)
    )
    labels[1] = torch.nan  # a score without a label
    return Split(torch.randn(N, 6, generator=generator), labels, task)


def scores_of(
    of: Task, logits: Tensor, labels: Tensor, teacher: Tensor | None = None, *, sizes: list[int], **rows: Tensor
) -> dict[str, float]:
    """Return the scores of batches of these sizes."""
    found: dict[str, Tensor] = {}
    for scores, against in ((of.scores(), labels), (of.fidelity(), teacher)):
        if against is not None:
            for part in torch.arange(len(logits)).split(sizes):
                scores.update(logits[part], against[part], {name: value[part] for name, value in rows.items()})
            found |= scores.compute()
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("sizes", [[N], [7, 1, 2, 50]])
def test_several_tasks_are_scored_each_on_its_rows_and_columns(split: Split, sizes: list[int]) -> None:
    """Batches of one or two rows lack tasks."""
    logits, labels, task = split
    teacher = logits.flip(0)
    found = scores_of(WHOLE, logits, labels, teacher, sizes=sizes, task=task)
    rows = task == 2
    alone = scores_of(Classification(3), logits[rows, 3:], labels[rows].long(), teacher[rows, 3:], sizes=[N // 3])
    of_kind = {name.removeprefix("kind/"): value for name, value in found.items() if name.startswith("kind/")}
    assert of_kind == pytest.approx(alone)
    rows = task == 1
    known = rows & ~labels.isnan()
    assert found["score/pearson"] == pytest.approx(pearsonr(logits[known, 2], labels[known]).statistic, rel=1e-5)
    difference = (logits[rows, 2] - teacher[rows, 2]).numpy()
    assert found["score/rmse_to_teacher"] == pytest.approx(float(np.sqrt((difference**2).mean())), rel=1e-6)
    mains = [found["side/accuracy"], found["score/pearson"], found["kind/accuracy"]]
    assert found["average"] == pytest.approx(sum(mains) / 3)
    assert WHOLE.monitor == "average"
    assert WHOLE.scores().update(logits, labels, {"task": task, "index": torch.arange(N)}) is None
    assert WHOLE.chance_score(labels) is None
    assert set(found) == {
        "average", *(f"{name}/{score}" for name in ("side", "kind") for score in OF_CLASSES),
        "score/pearson", "score/rmse", "score/rmse_to_teacher",
    }  # fmt: skip


def test_states_of_parts_add_up_to_those_of_the_split(split: Split) -> None:
    scores, parts = WHOLE.scores(), []
    for rows in (slice(20), slice(20, None)):
        scores.reset()
        scores.update(split.logits[rows], split.labels[rows], {"task": split.task[rows]})
        parts.append(scores.states())
    scores.load(parts[0] + parts[1])
    found = {name: float(value) for name, value in scores.compute().items()}
    expected = scores_of(WHOLE, split.logits, split.labels, sizes=[N], task=split.task)
    assert found == pytest.approx(expected, rel=1e-12)
    assert scores_of(WHOLE, split.logits[:20], split.labels[:20], sizes=[20], task=split.task[:20]) != found


def test_states_that_are_no_sums_are_refused() -> None:
    with pytest.raises(TypeError, match="MaxMetric keeps states that are no sums"):
        Scores({"largest": MaxMetric()}).states()


def test_the_loss_from_labels_is_weighted_and_each_example_counts_alike(split: Split) -> None:
    logits, labels, task = split
    batch: Batch = {"task": task, "labels": labels}
    output = ModelOutput(logits)
    rows = [task == k for k in range(3)]
    known = rows[1] & ~labels.isnan()
    expected = (
        F.cross_entropy(logits[rows[0], :2], labels[rows[0]].long())
        + F.mse_loss(logits[known, 2], labels[known])
        + 2 * F.cross_entropy(logits[rows[2], 3:], labels[rows[2]].long())
    ) / 3
    torch.testing.assert_close(WHOLE.loss()(output, output, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_regression(dtype: torch.dtype) -> None:
    task = Regression()
    labels = torch.tensor([1.0, -2.0, torch.nan, 0.5, -100.0])
    logits = torch.tensor([[0.5], [-1.0], [9.0], [1.0], [9.0]]).to(dtype)
    known = [0, 1, 3]
    expected = {
        "pearson": pearsonr([0.5, -1.0, 1.0], labels[known]).statistic, "rmse": float(np.sqrt((0.25 + 1 + 0.25) / 3)),
    }  # fmt: skip
    for sizes in ([5], [2, 1, 2]):
        assert scores_of(task, logits, labels, sizes=sizes) == pytest.approx(expected, rel=1e-6)
    output = ModelOutput(logits)
    torch.testing.assert_close(task.loss()(output, output, {"labels": labels}), torch.tensor(0.5))


@pytest.mark.parametrize("of_teacher", [False, True])
def test_a_nan_prediction_makes_every_score_of_its_task_nan(split: Split, of_teacher: bool) -> None:
    logits, teacher = split.logits, split.logits.flip(0).clone()
    for row in (3, 4, 5):  # one of each task
        (teacher if of_teacher else logits)[row] = torch.nan
    found = scores_of(WHOLE, logits, split.labels, teacher, sizes=[7, 1, 2, 50], task=split.task)
    near = ("agreement", "kl_to_teacher", "rmse_to_teacher")
    assert {name for name, value in found.items() if np.isnan(value)} == {
        name for name in found if not of_teacher or name.endswith(near)
    }


def test_a_teachers_score_of_minus_100_is_a_score() -> None:
    task, scores = Regression(), torch.tensor([[0.0], [1.0]])
    teacher = torch.tensor([[-100.0], [1.0]])
    found = scores_of(task, scores, torch.zeros(2), teacher, sizes=[2])
    assert found["rmse_to_teacher"] == pytest.approx(100 / 2**0.5)


def test_a_nan_prediction_is_read_as_nothing() -> None:
    logits = torch.tensor([[torch.nan, 0.0, 1.0]])
    with pytest.raises(KDError, match="the network predicts NaN"):
        Classification(3).read(logits, {}, ["a", "b", "c"])
    with pytest.raises(KDError, match="the network predicts NaN"):
        Regression().read(logits[:, :1], {}, ["score"])
    values = Classification(3).scores().update(logits, torch.tensor([0]), {"index": torch.tensor([0])})
    assert values is not None
    assert values.of["accuracy"][0].tolist() == [False]


def test_a_classification() -> None:
    task = Classification(3)
    labels = torch.tensor([0, 2, 2])
    values = task.scores().update(torch.eye(3), labels, {"index": torch.arange(3)})
    assert values is not None
    assert values.of["accuracy"][0].tolist() == [True, False, True]
    assert task.chance_score(labels) == pytest.approx(2 / 3)
    assert isinstance(task.loss(), CrossEntropyLoss)
    assert scores_of(task, torch.eye(3), labels, sizes=[3])["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("task", [Classification(4), Regression(), WHOLE], ids=lambda task: type(task).__name__)
def test_a_description_makes_the_task_again(task: Task) -> None:
    again = task_of(task.description)
    assert type(again) is type(task)
    assert again.outputs == task.outputs
    assert again.description == task.description


def test_predictions_are_read_in_plain_values() -> None:
    names = ["side: left", "side: right", "score: rating", "kind: a", "kind: b", "kind: c"]
    logits = torch.tensor([[0.0, 0.0, -1.25, 0.0, 9.0, 0.0], [0.0, 5.0, 0.5, 0.0, 0.0, 9.0]])
    found: list[dict[str, Any]] = WHOLE.read(logits, {}, names)
    assert [one["side"]["label"] for one in found] == ["left", "right"]
    assert found[0]["side"]["probabilities"] == {"left": 0.5, "right": 0.5}
    assert [one["score"] for one in found] == [{"score": -1.25}, {"score": 0.5}]
    assert [one["kind"]["label"] for one in found] == ["b", "c"]
    assert WHOLE.cells(found[0], names) == {"side": "left 0.500", "score": "-1.250", "kind": "b 1.000"}
    side = found[0]["side"]
    assert Classification(2).cells(side, ["left", "right"]) == {
        "label": "left",
        "p(left)": "0.500",
        "p(right)": "0.500",
    }
    assert Classification(2).cells(side, [str(number) for number in range(9)]) == {"label": "left", "p": "0.500"}
