from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.wsld import wsld
from kd_lightning.types import IGNORE
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
LABELS = torch.tensor([0, 3, 2, 1, 1, 0])
CASES = [
    Case("wsld", wsld, (STUDENT, TEACHER, LABELS), {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0),
    Case(
        "tokens", wsld, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2), torch.arange(12).view(4, 3) % 5), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


def weights() -> np.ndarray:
    p_s, p_t = (softmax(z.numpy(), axis=-1)[np.arange(6), LABELS.numpy()] for z in (STUDENT, TEACHER))
    return np.asarray(1 - np.exp(-np.log(p_s) / np.log(p_t)))


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    def test_gradcheck(self, case: Case) -> None:
        """The weight has no gradient, so finite differences, which move it, say something else: see below."""
        student = case.tensors[0].clone().requires_grad_()
        assert not torch.autograd.gradcheck(lambda x: case(x, *case.tensors[1:]), (student,), raise_exception=False)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_by_scipy(temperature: float) -> None:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    expected = weights() * temperature**2 * entropy(p_t, p_s, axis=-1)
    np.testing.assert_allclose(wsld(STUDENT, TEACHER, LABELS, temperature, reduction="none"), expected, rtol=1e-9)
    assert wsld(STUDENT, TEACHER, LABELS, temperature).item() == pytest.approx(expected.mean())
    assert wsld(STUDENT, TEACHER, LABELS, temperature, reduction="sum").item() == pytest.approx(expected.sum())


def test_the_gradient_is_that_of_soft_targets_times_the_weight() -> None:
    student = STUDENT.clone().requires_grad_()
    wsld(student, TEACHER, LABELS, 2.0).backward()
    p_s, p_t = (softmax(z.numpy() / 2.0, axis=-1) for z in (STUDENT, TEACHER))
    assert student.grad is not None
    np.testing.assert_allclose(student.grad, weights()[:, None] * 2.0 * (p_s - p_t) / 6, rtol=1e-9, atol=1e-15)


def test_the_weight_goes_from_0_to_1() -> None:
    labels = torch.tensor([0])
    sure_and_right, wrong = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    unsure = torch.tensor([[0.0, 0.0]])
    assert wsld(sure_and_right, unsure, labels).item() == 0.0  # the student has nothing to learn of the label
    torch.testing.assert_close(wsld(wrong, sure_and_right, labels), soft_target(wrong, sure_and_right))
    assert wsld(sure_and_right, sure_and_right, labels).item() == 0.0
    student, teacher = torch.tensor([[0.5, 0.1, 0.4]]).log(), torch.tensor([[0.5, 0.4, 0.1]]).log()
    as_good = (1 - math.exp(-1)) * soft_target(student, teacher)
    torch.testing.assert_close(wsld(student, teacher, labels), as_good)


def test_examples_without_a_label_do_not_count() -> None:
    labels = LABELS.clone()
    labels[[1, 4]] = IGNORE
    each = wsld(STUDENT, TEACHER, LABELS, reduction="none")
    assert wsld(STUDENT, TEACHER, labels).item() == pytest.approx(each[[0, 2, 3, 5]].mean().item())
