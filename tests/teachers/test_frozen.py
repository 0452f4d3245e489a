from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.losses import SoftTargetLoss
from kd_lightning.models.adapt import run_network
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.types import Batch, ModelOutput


class Network(nn.Module):
    """Everything about it that a forgotten `eval()` or `requires_grad_(False)` would change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values: Tensor, shift: Tensor | None = None) -> ModelOutput:
        hidden = self.linear(pixel_values)
        logits = self.dropout(self.norm(hidden))
        return ModelOutput(logits if shift is None else logits + shift, {"hidden": hidden})


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = Network()
    network.train()
    network(torch.randn(16, 4))  # BatchNorm statistics that are not the initial ones
    return network


@pytest.fixture
def batch() -> Batch:
    return {"pixel_values": torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), "index": torch.arange(8)}


def test_it_answers_as_the_network_does_in_eval_mode(network: Network, batch: Batch) -> None:
    expected = run_network(copy.deepcopy(network).eval(), batch)
    output = FrozenTeacher(network)(batch)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.features["hidden"], expected.features["hidden"])


def test_it_stays_in_eval_mode_whoever_asks_for_training(network: Network, batch: Batch) -> None:
    teacher = FrozenTeacher(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = teacher(batch).logits
    nn.Sequential(teacher).train()
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(batch).logits, first)  # no dropout
    for name, value in network.state_dict().items():  # no BatchNorm statistics
        assert torch.equal(value, before[name]), name


def test_its_parameters_are_frozen_and_its_output_has_no_graph(network: Network, batch: Batch) -> None:
    teacher = FrozenTeacher(network)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    output = teacher(batch)
    for value in (output.logits, *output.features.values()):
        assert not value.requires_grad


def test_its_output_can_be_saved_for_a_backward_pass(network: Network, batch: Batch) -> None:
    output = FrozenTeacher(network)(batch)
    assert not output.logits.is_inference()
    assert not output.features["hidden"].is_inference()
    student = torch.zeros(8, 3, requires_grad=True)
    SoftTargetLoss(2.0)(ModelOutput(student), output, batch).backward()
    ((student - output.logits) * output.logits * output.features["hidden"]).sum().backward()
    assert student.grad is not None


def test_where_the_batch_has_entries_for_the_teacher_it_reads_those(network: Network, batch: Batch) -> None:
    teacher, own = FrozenTeacher(network), torch.full((8, 4), 2.0)
    expected = teacher({"pixel_values": own}).logits
    both = {**batch, "teacher_pixel_values": own}
    assert torch.equal(teacher(both).logits, expected)
    assert not torch.equal(teacher(batch).logits, expected)
    # the student's entries are not mixed in: `shift` is none of the teacher's
    assert torch.equal(teacher({**both, "shift": torch.ones(3)}).logits, expected)
    assert torch.equal(teacher({**both, "teacher_shift": torch.ones(3)}).logits, expected + 1)
    assert set(both) == {"pixel_values", "index", "teacher_pixel_values"}  # and the batch is left as it was


def test_bf16_whatever_the_student_trains_in(network: Network, batch: Batch) -> None:
    plain = FrozenTeacher(network)(batch).features["hidden"]
    narrow = FrozenTeacher(network, precision="bf16-mixed")(batch).features["hidden"]
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), plain, rtol=0.05, atol=0.05)


def test_full_precision_also_inside_the_students_autocast(network: Network, batch: Batch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert FrozenTeacher(network, precision="32-true")(batch).features["hidden"].dtype == torch.float32
        assert FrozenTeacher(network)(batch).features["hidden"].dtype == torch.bfloat16  # left to the caller


def test_to_moves_it_and_returns_it(network: Network) -> None:
    teacher = FrozenTeacher(network)
    assert teacher.to(torch.device("cpu")) is teacher
    assert next(teacher.to(torch.device("meta")).parameters()).device.type == "meta"
