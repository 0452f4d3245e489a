"""What a report shows beside scores, against counts worked out by hand and scikit-learn-like oracles in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.tasks import CausalLanguageModeling, Classification, MultiTask, Regression, TokenClassification
from kd_lightning.tasks.details import BINS, EXAMPLES, MOST_CLASSES, ClassDetails, ScoreDetails
from kd_lightning.tasks.evaluation import evaluate_all
from kd_lightning.tasks.metrics import expected_calibration_error
from kd_lightning.types import IGNORE, ModelOutput


def probabilities(*rows: list[float]) -> torch.Tensor:
    return torch.log(torch.tensor(rows))


def test_classes_are_counted_as_by_hand() -> None:
    details = ClassDetails(3)
    logits = probabilities([0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1])
    rows = {"labels": torch.tensor([0, 1, 2, IGNORE]), "index": torch.arange(4)}
    details.update(logits[:2], None, {name: value[:2] for name, value in rows.items()})
    details.update(logits[2:], None, {name: value[2:] for name, value in rows.items()})
    found = details.compute()
    assert found["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert (found["labels"], found["predicted"], found["right"]) == ([1, 1, 1], [2, 0, 1], [1, 0, 1])
    assert [one["examples"] for one in found["bins"]] == [1, 1, 1]
    assert [one["accuracy"] for one in found["bins"]] == [0, 1, 1]
    assert [one["confidence"] for one in found["bins"]] == pytest.approx([0.6, 0.7, 0.8])
    assert details.examples() == [], "without a teacher nothing is apart"


def test_bins_add_up_to_the_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(500, 4, generator=generator), torch.randint(0, 4, (500,), generator=generator)
    details = ClassDetails(4)
    for part in range(0, 500, 64):
        rows = {"labels": labels[part : part + 64], "index": torch.arange(500)[part : part + 64]}
        details.update(logits[part : part + 64], None, rows)
    bins = details.compute()["bins"]
    error = sum(one["examples"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / 500
    assert error == pytest.approx(float(expected_calibration_error(logits, labels, BINS)), abs=1e-6)


def test_the_farthest_of_a_split_are_kept_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    own, teacher = (torch.randn(200, 5, generator=generator) for _ in range(2))
    index = torch.randperm(200, generator=generator) + 1000
    p, q = (np.exp(one.double().numpy()) / np.exp(one.double().numpy()).sum(1, keepdims=True) for one in (own, teacher))
    distance = np.abs(p - q).sum(1) / 2
    expected = index[np.argsort(-distance)[:EXAMPLES].copy()].tolist()
    for size in (200, 7):
        details = ClassDetails(5)
        for part in torch.arange(200).split(size):
            rows = {"labels": torch.zeros(len(part), dtype=torch.int64), "index": index[part]}
            details.update(own[part], teacher[part], rows)
        assert [one["index"] for one in details.examples()] == expected
    first = details.examples()[0]
    place = int((index == expected[0]).nonzero())
    order = np.argsort(-p[place])[:3]
    assert [number for number, _ in first["student"]] == order.tolist()
    assert [chance for _, chance in first["student"]] == pytest.approx(p[place][order].tolist(), rel=1e-5)
    assert first["distance"] == pytest.approx(distance.max(), rel=1e-5)


def test_a_label_of_what_is_no_number_is_predicted_by_nothing_and_the_farthest() -> None:
    details, logits = ClassDetails(2), 3 * torch.eye(2)[torch.tensor([0, 0, 1, 1, 1])]
    teacher = logits.clone()
    logits[3, 0], logits[4, 1], teacher[0] = torch.nan, torch.inf, -logits[0]
    rows = {"labels": torch.tensor([0, 0, 1, 1, IGNORE]), "index": torch.arange(5)}
    details.update(logits[:2], teacher[:2], {name: value[:2] for name, value in rows.items()})
    details.update(logits[2:], teacher[2:], {name: value[2:] for name, value in rows.items()})
    found = details.compute()
    assert (found["labels"], found["predicted"], found["right"]) == ([2, 2], [2, 1], [2, 1])
    assert found["unpredicted"] == 1, "example 4 has no label"
    assert found["confusion"] == [[2, 0], [0, 1]]
    assert sum(one["examples"] for one in found["bins"]) == 3
    assert [(one["index"], one["student"]) for one in details.examples()[:2]] == [(3, []), (4, [])]
    assert [one["distance"] for one in details.examples()[:2]] == [torch.inf, torch.inf]
    assert details.examples()[2]["index"] == 0


def test_a_score_that_is_no_number_is_the_farthest() -> None:
    details, own = ScoreDetails(), torch.tensor([[9.0], [torch.nan], [1.0]])
    details.update(own, torch.ones(3, 1), {"labels": torch.ones(3), "index": torch.arange(3)})
    assert [one["index"] for one in details.examples()] == [1, 0]


def test_many_classes_have_no_confusion() -> None:
    details = ClassDetails(MOST_CLASSES + 1)
    details.update(torch.eye(21), None, {"labels": torch.arange(21), "index": torch.arange(21)})
    assert details.compute()["confusion"] is None
    assert details.compute()["right"] == [1] * 21


def test_scores_differ_by_their_distance() -> None:
    details = ScoreDetails()
    rows = {"labels": torch.tensor([1.0, torch.nan]), "index": torch.tensor([8, 9])}
    details.update(torch.tensor([[0.5], [3.0]]), torch.tensor([[1.0], [1.0]]), rows)
    assert details.examples() == [
        {"index": 9, "distance": 2.0, "label": None, "student": 3.0, "teacher": 1.0},
        {"index": 8, "distance": 0.5, "label": 1.0, "student": 0.5, "teacher": 1.0},
    ]
    assert details.compute() == {}


def test_several_tasks_have_each_their_own() -> None:
    task = MultiTask({"a": Classification(2), "b": Regression()})
    details = task.details()
    logits = torch.tensor([[2.0, 0.0, 9.0], [9.0, 9.0, 1.5]])
    rows = {"labels": torch.tensor([1.0, 2.0]), "index": torch.tensor([0, 7]), "task": torch.tensor([0, 1])}
    for one in details.values():
        one.update(logits, torch.zeros(2, 3), rows)
    assert details["a"].compute()["confusion"] == [[0, 0], [1, 0]]
    assert [one["index"] for one in details["a"].examples()] == [0]
    assert details["b"].examples() == [{"index": 7, "distance": 1.5, "label": 2.0, "student": 1.5, "teacher": 0.0}]


def test_an_evaluation_adds_each_batch_once_and_the_teacher_has_no_teacher() -> None:
    task, generator = Classification(3), torch.Generator().manual_seed(2)
    table = {name: torch.randn(20, 3, generator=generator) for name in ("teacher", "student")}
    models = {name: (lambda batch, own=own: ModelOutput(own[batch["index"]])) for name, own in table.items()}
    labels = torch.randint(0, 3, (20,), generator=generator)
    batches = [{"index": part, "labels": labels[part]} for part in torch.arange(20).split(6)]
    watched = {name: task.details() for name in models}
    found = evaluate_all(task, models, batches, reference="teacher", details=watched)
    for name in models:
        counts = watched[name][""].compute()
        assert sum(counts["labels"]) == 20
        assert sum(counts["right"]) / 20 == pytest.approx(found[name].scores["accuracy"])
    assert len(watched["student"][""].examples()) == EXAMPLES
    assert watched["teacher"][""].examples() == []


def test_a_task_without_classes_or_scores_shows_nothing_more() -> None:
    assert CausalLanguageModeling(10).details() == {}


def test_tags_are_counted_at_the_words_that_their_accuracy_counts() -> None:
    task, generator = TokenClassification(["O", "B-A", "I-A"]), torch.Generator().manual_seed(3)
    table, labels = torch.randn(8, 5, 3, generator=generator), torch.randint(0, 3, (8, 5), generator=generator)
    keep = torch.rand(8, 5, generator=generator) < 0.7
    table[~keep] = torch.nan
    batches = [
        {"index": part, "labels": labels[part], "keep": keep[part]} for part in torch.arange(8).split(3)
    ]  # fmt: skip
    model = {"a": lambda batch: ModelOutput(table[batch["index"]])}
    watched = {"a": task.details()}
    found = evaluate_all(task, model, batches, details=watched)["a"].scores
    counts = watched["a"][""].compute()
    assert sum(counts["labels"]) == int(keep.sum())
    assert sum(counts["right"]) / sum(counts["labels"]) == pytest.approx(found["token_accuracy"])
    assert watched["a"][""].examples() == []
