from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks import TokenClassification, task_of
from kd_lightning.tasks.evaluation import evaluate_all
from kd_lightning.types import IGNORE, Batch, ModelOutput

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
TASK = TokenClassification(TAGS)
OUT, LOC, MORE_LOC, PER, MORE_PER = range(5)


def batch(labels: list[list[int]], keep: list[list[int]] | None = None, **more: Tensor) -> Batch:
    told = torch.tensor(labels)
    kept = told != IGNORE if keep is None else torch.tensor(keep).bool()
    rows = {"input_ids": torch.zeros_like(told), "labels": told, "keep": kept, "index": torch.arange(len(told))}
    return {**rows, "window_of": torch.full((len(told),), -1), **more}


def logits(classes: list[list[int]]) -> Tensor:
    return 4 * torch.eye(len(TAGS))[torch.tensor(classes)]


def scored(predicted: list[list[int]], rows: Batch) -> dict[str, float]:
    scores = TASK.scores()
    scores.update(logits(predicted), rows["labels"], TASK.compared(rows))
    assert list(scores.compute()) == scores.names
    return {name: float(value) for name, value in scores.compute().items()}


def test_scores_are_of_entities_and_of_single_tags() -> None:
    found = scored([[PER, OUT, LOC, OUT]], batch([[PER, MORE_PER, LOC, IGNORE]]))
    assert found["entity_f1"] == found["entity_precision"] == found["entity_recall"] == 0.5
    assert found["token_accuracy"] == pytest.approx(2 / 3)
    assert (found["LOC/f1"], found["PER/f1"]) == (1.0, 0.0)
    assert found["cross_entropy"] > 0


def test_only_the_first_token_of_a_word_is_scored() -> None:
    begins = torch.tensor([[True, False, True]])
    rows = batch([[PER, MORE_PER, OUT]], begins=begins)
    assert scored([[PER, LOC, OUT]], rows)["entity_f1"] == 1.0
    assert scored([[PER, LOC, OUT]], rows)["token_accuracy"] == 1.0


def test_windows_of_a_text_are_scored_as_one() -> None:
    rows = batch([[OUT, PER], [MORE_PER, OUT]], window_of=torch.tensor([5, 5]))
    assert scored([[OUT, PER], [MORE_PER, OUT]], rows)["entity_precision"] == 1.0
    apart = batch([[OUT, PER], [MORE_PER, OUT]])
    scores, together = TASK.scores(), TASK.scores()
    for one, given in ((scores, apart), (together, rows)):
        one.update(logits([[OUT, PER], [OUT, OUT]]), given["labels"], given)
    assert float(scores.compute()["PER/f1"]) == pytest.approx(2 / 3)  # two entities, one of them found
    assert float(together.compute()["PER/f1"]) == 0.0  # one entity, cut short
    assert together.states().shape == scores.states().shape


def test_states_of_parts_add_up() -> None:
    rows = batch([[PER, MORE_PER, OUT], [LOC, OUT, PER]])
    predicted = logits([[PER, OUT, OUT], [LOC, OUT, PER]])
    whole, part = TASK.scores(), TASK.scores()
    whole.update(predicted, rows["labels"], rows)
    total = torch.zeros(0)
    for i in range(2):
        part.reset()
        part.update(predicted[i : i + 1], rows["labels"][i : i + 1], {name: x[i : i + 1] for name, x in rows.items()})
        total = part.states() if i == 0 else total + part.states()
    part.load(total)
    assert {n: float(v) for n, v in part.compute().items()} == {n: float(v) for n, v in whole.compute().items()}


def test_evaluation_streams_with_a_teacher() -> None:
    batches = [batch([[PER, MORE_PER, OUT, IGNORE]]), batch([[LOC, OUT], [OUT, PER]])]
    right = {4: [[PER, MORE_PER, OUT, LOC]], 2: [[LOC, OUT], [OUT, PER]]}

    def teacher(rows: Batch) -> ModelOutput:
        return ModelOutput(logits(right[rows["labels"].shape[1]]))

    def student(rows: Batch) -> ModelOutput:
        return ModelOutput(torch.where(rows["labels"][..., None] == OUT, 1.0, teacher(rows).logits))

    found = evaluate_all(TASK, {"teacher": teacher, "student": student}, batches, reference="teacher")
    assert found["teacher"].scores["entity_f1"] == 1.0
    assert found["student"].scores["agreement"] == 1.0  # the first of equal logits, and what is not kept counts nowhere
    assert found["student"].scores["kl_to_teacher"] > 0
    assert found["teacher"].units == {}


def test_entities_are_read_with_the_mean_probability_of_their_words() -> None:
    row = torch.full((1, 4, 5), 0.0)
    row[0, 1] = 9 * torch.eye(5)[PER]
    row[0, 3] = 9 * torch.eye(5)[MORE_PER]
    keep = torch.tensor([[False, True, False, True]])
    ((record,),) = [TASK.read(row, {"keep": keep}, TAGS)]
    (entity,) = record["entities"]
    assert (entity["type"], entity["start"], entity["stop"]) == ("PER", 0, 2)
    assert entity["score"] == pytest.approx(float(row[0, 1].softmax(0).max()), abs=1e-4)
    row[0, 0] = torch.nan  # no word
    TASK.read(row, {"keep": keep}, TAGS)
    row[0, 1] = torch.nan
    with pytest.raises(KDError, match="predicts NaN"):
        TASK.read(row, {"keep": keep}, TAGS)


def test_the_best_constant_marks_each_word_as_an_entity() -> None:
    labels = torch.tensor([OUT, PER, OUT, LOC, MORE_LOC, PER, OUT, OUT])
    assert TASK.chance_score(labels) == pytest.approx(2 * 2 / (8 + 3))  # B-PER finds both people of one word


def test_logits_of_whole_texts_are_refused() -> None:
    rows = batch([[OUT, PER]])
    TASK.check_logits(torch.zeros(1, 2, 5), rows)
    for wrong in (torch.zeros(1, 5), torch.zeros(1, 2, 4), torch.zeros(1, 3, 5)):
        with pytest.raises(ConfigError, match=r"the data have tags for \[1, 2, 5\]: one a token"):
            TASK.check_logits(wrong, rows)


def test_a_task_is_made_again_of_its_description() -> None:
    again = task_of(TASK.description)
    assert isinstance(again, TokenClassification)
    assert (again.class_names, again.types, again.monitor) == (TAGS, ["LOC", "PER"], "entity_f1")
