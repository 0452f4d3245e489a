"""Models on a split: side by side, batch by batch, and nothing kept but scores and a small vector an example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.tasks import Classification, MultiTask, evaluation
from kd_lightning.tasks.evaluation import evaluate, evaluate_all, labelled_rows, labels_of, of_network
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.tasks.toy import Tagger, Tagging

INPUTS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
ORDER = [4, 0, 6, 1, 5, 3, 2]


def batches(order: list[int], size: int) -> list[Batch]:
    return [
        {"pixel_values": INPUTS[rows], "labels": LABELS[rows], "index": rows}
        for rows in torch.tensor(order).split(size)
    ]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dropout(self.linear(pixel_values)))
        return out


def test_scores_and_what_is_right_are_those_of_the_whole_split_in_the_order_of_index() -> None:
    torch.manual_seed(0)
    network = Network()
    logits = network.eval()(INPUTS).detach()
    found = evaluate(Classification(3), of_network(network.train()), batches(ORDER, 3))
    right = logits.argmax(1) == LABELS
    assert found.units["accuracy"].totals.tolist() == right.tolist()
    assert found.units["accuracy"].weights.tolist() == [1] * 7
    assert found.examples == 7
    assert found.scores["accuracy"] == pytest.approx(float(right.float().mean()))
    assert found.scores["cross_entropy"] == pytest.approx(float(nn.functional.cross_entropy(logits, LABELS)), rel=1e-6)


def test_the_teacher_predicts_each_batch_once_for_all_students() -> None:
    asked: list[int] = []

    def teacher(batch: Batch) -> ModelOutput:
        asked.extend(batch["index"].tolist())
        return ModelOutput(batch["pixel_values"][:, :3].bfloat16())

    students = {name: of_network(Network()) for name in ("a", "b")}
    found = evaluate_all(Classification(3), {**students, "teacher": teacher}, batches(ORDER, 2), reference="teacher")
    assert asked == ORDER
    assert found["teacher"].scores["agreement"] == 1.0
    assert found["teacher"].scores["kl_to_teacher"] == 0.0
    assert found["a"].scores["kl_to_teacher"] > 0
    alone = evaluate(Classification(3), students["a"], batches(ORDER, 2))
    assert {name: found["a"].scores[name] for name in alone.scores} == alone.scores


def test_a_network_is_in_eval_mode_for_a_batch_and_then_in_its_own() -> None:
    network = Network().train()
    network.dropout.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(Classification(3), of_network(network), batches(ORDER, 3))
    assert (network.training, network.norm.training, network.dropout.training) == (True, True, False)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        of_network(network)({"pixel_values": torch.zeros(2, 5)})
    assert network.norm.training


def tagged() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (5, 4), generator=generator)
    labels = (ids % 3).masked_fill(ids == 4, IGNORE)
    whole = {"input_ids": ids, "labels": labels, "keep": ids != 7, "index": torch.arange(5)}
    return [{name: value[rows] for name, value in whole.items()} for rows in torch.tensor([3, 1, 4, 0, 2]).split(2)]


def test_tokens_are_scored_where_they_are_kept() -> None:
    torch.manual_seed(0)
    network = Tagger(9, 3)
    found = evaluate(Tagging(3), of_network(network), tagged())
    whole = {name: torch.cat([batch[name] for batch in tagged()]) for name in tagged()[0]}
    counted = whole["keep"] & (whole["labels"] != IGNORE)
    logits = network(whole["input_ids"])[counted].detach()
    assert found.scores["accuracy"] == pytest.approx(
        float((logits.argmax(1) == whole["labels"][counted]).float().mean())
    )
    assert found.units == {}
    assert found.examples == 5
    (kept,), labels = labelled_rows(Tagging(3), [of_network(network)], tagged())
    order = whole["index"].argsort()
    expected = [whole[name][order][counted[order]] for name in ("labels", "input_ids")]
    assert torch.equal(labels, expected[0])
    torch.testing.assert_close(kept, network(expected[1]).detach())
    assert len(labels_of(Tagging(3), tagged())) == whole["keep"].sum()


@pytest.mark.parametrize("most", [1, 3, 6])
def test_of_a_large_split_rows_from_all_of_it_are_kept(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [of_network(Network()), of_network(Network())]
    logits, labels = labelled_rows(Classification(3), models, batches(ORDER, 2))
    assert logits.shape == (2, 7, 3)
    assert torch.equal(labels, LABELS)
    monkeypatch.setattr(evaluation, "MOST_NUMBERS", 6 * most)
    few, _ = labelled_rows(Classification(3), models, batches(ORDER, 2))
    assert most / 2 <= few.shape[1] <= most
    rows = [(logits[0] == row).all(1).nonzero().item() for row in few[0]]
    assert rows == sorted(rows)


def test_one_of_several_processes_scores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first one evaluates what a stage leaves: waiting for the others would be for ever."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it waits for other processes")

    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", refuse)
    for task in (Classification(3), MultiTask({"a": Classification(3), "b": Classification(3)})):
        for scores in (task.scores(), task.fidelity()):
            scores.alone().compute()
    with pytest.raises(AssertionError, match="waits"):  # as those of a training do
        Classification(3).scores().compute()
