from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.teacher_free import TeacherFreeLoss, teacher_free
from kd_lightning.training.objective import Objective
from kd_lightning.training.schedules import Linear
from kd_lightning.types import IGNORE, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

LOGITS, LABELS = randn(6, 4, seed=1, scale=2.0), torch.tensor([0, 3, 2, 1, 1, 0])


def without_teacher(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return teacher_free(student, labels, **options)


class WithoutTeacher(Case):
    def reads(self, side: int) -> Tensor:
        return torch.full_like(self.tensors[side], side == 0, dtype=torch.bool)


# zero=False: there is no teacher to be equal to
CASES = [
    WithoutTeacher(
        "teacher_free", without_teacher, (LOGITS, LOGITS, LABELS), {"temperature": 2.0},
        mask=torch.arange(6) % 2 == 0, zero=False,
    ),
    WithoutTeacher(
        "tokens", without_teacher, (randn(4, 3, 5, seed=1), randn(4, 3, 5), torch.arange(12).view(4, 3) % 5), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1, zero=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def virtual_teacher(a: float) -> np.ndarray:
    return np.where(np.eye(4)[LABELS.numpy()] == 1, a, (1 - a) / 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("a", [0.9, 0.99])
def test_value_by_scipy(a: float, temperature: float) -> None:
    u = virtual_teacher(a) ** (1 / temperature)
    expected = temperature**2 * entropy(
        u / u.sum(-1, keepdims=True), softmax(LOGITS.numpy() / temperature, -1), axis=-1
    )
    np.testing.assert_allclose(teacher_free(LOGITS, LABELS, temperature, a, reduction="none"), expected, rtol=1e-9)
    assert teacher_free(LOGITS, LABELS, temperature, a).item() == pytest.approx(expected.mean())
    assert teacher_free(LOGITS, LABELS, temperature, a, reduction="sum").item() == pytest.approx(expected.sum())


def test_it_is_soft_targets_of_a_teacher_with_the_virtual_logits() -> None:
    teacher = torch.from_numpy(np.log(virtual_teacher(0.9))) + 5.0
    torch.testing.assert_close(teacher_free(LOGITS, LABELS, 3.0, 0.9), soft_target(LOGITS, teacher, 3.0))
    assert teacher_free(teacher, LABELS, 3.0, 0.9).item() == pytest.approx(0.0, abs=1e-12)


def test_at_temperature_1_it_has_the_gradient_of_label_smoothing() -> None:
    gradients = []
    for function, argument in (
        (teacher_free, {"correct_probability": 0.9}),
        (cross_entropy, {"label_smoothing": 0.1 * 4 / 3}),
    ):
        logits = LOGITS.clone().requires_grad_()
        function(logits, LABELS, **argument).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_only_labelled_examples_count() -> None:
    labels = LABELS.clone()
    labels[[1, 4]] = IGNORE
    known = labels != IGNORE
    torch.testing.assert_close(teacher_free(LOGITS, labels), teacher_free(LOGITS[known], labels[known]))
    assert teacher_free(LOGITS, torch.full((6,), IGNORE)).item() == 0.0


def test_the_term_needs_no_teacher_leaves_rows_out_and_follows_its_schedule() -> None:
    term = TeacherFreeLoss(Linear(start=8.0, end=2.0), correct_probability=0.9)
    assert not Objective({"kd": term}, {"kd": 1.0}).uses_teacher
    term.progress = 0.5
    assert term.settings() == {"temperature": 5.0}
    logits, labels = randn(2, 4, 5), torch.tensor([[0, 1, 2, IGNORE], [3, IGNORE, 1, 0]])
    value = term(ModelOutput(logits), ModelOutput(torch.zeros(0)), {"labels": labels, "keep": labels != 1})
    known = (labels != 1) & (labels != IGNORE)
    torch.testing.assert_close(value, teacher_free(logits[known], labels[known], 5.0, 0.9))


@pytest.mark.parametrize("a", [0.0, 1.0, float("nan")])
def test_refuses_a_probability_out_of_range(a: float) -> None:
    with pytest.raises(ValueError, match=r"correct_probability must be in \(0, 1\)"):
        teacher_free(LOGITS, LABELS, correct_probability=a)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="temperature must be a positive number, got -1"):
        teacher_free(LOGITS, LABELS, -1.0)
    with pytest.raises(ValueError, match=r"labels \(2,\) must have the shape \(6,\) of the logits"):
        teacher_free(LOGITS, LABELS[:2])
    with pytest.raises(ValueError, match=r"mask \(2,\) must have the shape \(6,\)"):
        teacher_free(LOGITS, LABELS, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"logits \(6, 1\): a label's class and others need two classes or more"):
        teacher_free(LOGITS[:, :1], LABELS)
