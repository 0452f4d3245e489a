from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.teachers.multi_task import MultiTaskTeacher, SideBySide
from kd_lightning.types import Batch, ModelOutput


class Says:
    """A teacher that answers from a table by its own `index`, and remembers what it was asked."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.asked, self.flushed = logits, [], False  # type: ignore[var-annotated]

    def __call__(self, batch: Batch) -> ModelOutput:
        self.asked.append(batch)
        return ModelOutput(self.logits[batch["index"]], {"hidden": torch.ones(1)})

    def to(self, device: torch.device) -> Says:
        return Says(self.logits.to(device))

    def flush(self) -> None:
        self.flushed = True


def teachers() -> list[Says]:
    torch.manual_seed(0)
    return [Says(torch.randn(4, 2, dtype=torch.float64)), Says(torch.randn(5, 1)), Says(torch.randn(3, 3))]


SPANS, FIRSTS = [range(2), range(2, 3), range(3, 6)], [0, 4, 9]
BATCH: Batch = {
    "task": torch.tensor([2, 0, 2, 0]), "index": torch.tensor([9, 3, 11, 0]),
    "input_ids": torch.arange(8).view(4, 2), "teacher_input_ids": torch.arange(12).view(4, 3),
}  # fmt: skip


def test_each_teacher_is_asked_about_its_own_examples_and_fills_its_columns() -> None:
    asked = teachers()
    said = MultiTaskTeacher(asked, SPANS, FIRSTS)(BATCH)
    expected = torch.zeros(4, 6)
    expected[[1, 3], :2] = asked[0].logits[[3, 0]].float()
    expected[[0, 2], 3:] = asked[2].logits[[0, 2]]
    assert torch.equal(said.logits, expected)
    assert said.logits.dtype == torch.float32
    assert said.features == {}
    assert [len(one.asked) for one in asked] == [1, 0, 1], "one whose task is not there is not asked"
    own = asked[0].asked[0]
    assert set(own) == {"index", "input_ids", "teacher_input_ids"}
    assert own["input_ids"].tolist() == [[2, 3], [6, 7]]
    assert own["teacher_input_ids"].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert BATCH["index"].tolist() == [9, 3, 11, 0], "the batch is left as it is"


def test_every_teacher_moves_and_flushes() -> None:
    asked = teachers()
    teacher = MultiTaskTeacher(asked, SPANS, FIRSTS)
    teacher.flush()
    assert all(one.flushed for one in asked)
    assert teacher.to(torch.device("cpu")) is teacher
    assert not any(one in asked for one in teacher.teachers), "what `to` returns is kept"


class Bag(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.bag(input_ids)  # type: ignore[no-any-return]


def test_networks_side_by_side() -> None:
    networks = [Bag(2), Bag(1)]
    said = run_network(SideBySide(networks), BATCH).logits
    assert torch.equal(said, torch.cat([network(BATCH["input_ids"]) for network in networks], 1))
    frozen = FrozenTeacher(SideBySide(networks))({"input_ids": BATCH["input_ids"], "task": BATCH["task"]})
    assert torch.equal(frozen.logits, said)
