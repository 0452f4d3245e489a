"""The average of the student's weights: its closed form, its buffers, its state, and what it reads."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import EMATeacher


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.dropout(self.norm(self.linear(pixel_values)))
        return logits


def changed(network: nn.Module) -> Tensor:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    return next(network.parameters()).detach().double().clone()


def average(teacher: EMATeacher) -> Tensor:
    return next(teacher.network.parameters()).double()


def test_it_is_the_mean_of_all_weights_until_the_decay_is_reached() -> None:
    torch.manual_seed(0)
    student = Network()
    teacher = EMATeacher(student, decay=0.9)
    seen = [next(student.parameters()).detach().double().clone()]
    for _ in range(9):  # 1 - 1 / (t + 1) reaches 0.9 at t = 9
        seen.append(changed(student))
        teacher.update(student)
        torch.testing.assert_close(average(teacher), torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)


def test_then_it_forgets_exponentially() -> None:
    torch.manual_seed(0)
    student = Network()
    teacher = EMATeacher(student, decay=0.5)
    seen = [next(student.parameters()).detach().double().clone()]
    for _ in range(6):
        seen.append(changed(student))
        teacher.update(student)
    weights = torch.tensor([0.5**6, *(0.5 ** (6 - t + 1) for t in range(1, 7))], dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(1.0)
    expected = sum(weight * value for weight, value in zip(weights, seen, strict=True))
    torch.testing.assert_close(average(teacher), expected, rtol=1e-5, atol=1e-6)


def test_buffers_are_copied_and_the_student_is_left_alone() -> None:
    torch.manual_seed(0)
    student = Network()
    teacher = EMATeacher(student, decay=0.99)
    student(torch.randn(8, 3) + 5)
    before = copy.deepcopy(student.state_dict())
    teacher.update(student)
    assert torch.equal(teacher.network.norm.running_mean, student.norm.running_mean)  # type: ignore[union-attr]
    assert teacher.network.norm.num_batches_tracked == 1  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}


def test_it_answers_in_eval_mode_without_a_graph_what_the_student_reads() -> None:
    torch.manual_seed(0)
    student = Network()
    teacher = EMATeacher(student, features=["linear"])
    teacher.train()
    inputs = torch.randn(4, 3)
    answer = teacher({"pixel_values": inputs, "teacher_pixel_values": torch.zeros(4, 3)})
    student.eval()
    torch.testing.assert_close(answer.logits, student(inputs))
    torch.testing.assert_close(answer.features["linear"], student.linear(inputs))
    assert not answer.logits.requires_grad


def test_its_state_goes_through_a_file_and_goes_on_bit_by_bit() -> None:
    torch.manual_seed(0)
    student = Network()
    teacher = EMATeacher(student, decay=0.8)
    for _ in range(3):
        changed(student)
        teacher.update(student)
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    other = EMATeacher(Network(), decay=0.8)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.updates == 3
    changed(student)
    for one in (teacher, other):
        one.update(student)
    assert torch.equal(average(other), average(teacher))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=rf"teacher.ema={decay} must be at least 0 and below 1"):
        EMATeacher(Network(), decay)
