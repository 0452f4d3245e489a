from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import entropy

from kd_lightning.losses.multi_label import multi_label
from kd_lightning.losses.soft_target import soft_target
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
CASES = [
    Case("multi_label", multi_label, (STUDENT, TEACHER), {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0),
    Case(
        "tokens", multi_label, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_is_the_divergence_of_the_joint_distributions(temperature: float) -> None:
    combinations = np.array(list(itertools.product([0, 1], repeat=4)))  # all sets of labels, 16
    joint = []
    for z in (TEACHER, STUDENT):
        p = expit(z.numpy() / temperature)[:, None]
        joint.append(np.where(combinations == 1, p, 1 - p).prod(-1))
    expected = temperature**2 * entropy(*joint, axis=-1)
    np.testing.assert_allclose(multi_label(STUDENT, TEACHER, temperature, reduction="none"), expected, rtol=1e-9)
    assert multi_label(STUDENT, TEACHER, temperature).item() == pytest.approx(expected.mean())
    assert multi_label(STUDENT, TEACHER, temperature, reduction="sum").item() == pytest.approx(expected.sum())


def test_one_label_is_soft_targets_of_two_classes() -> None:
    student, teacher = (torch.cat([z[:, :1], torch.zeros(6, 1)], 1) for z in (STUDENT, TEACHER))
    torch.testing.assert_close(multi_label(STUDENT[:, :1], TEACHER[:, :1], 3.0), soft_target(student, teacher, 3.0))


def test_the_gradient_is_t_times_the_difference_of_probabilities() -> None:
    student = STUDENT.clone().requires_grad_()
    multi_label(student, TEACHER, 3.0).backward()
    p_s, p_t = (expit(z.numpy() / 3.0) for z in (STUDENT, TEACHER))
    assert student.grad is not None
    np.testing.assert_allclose(student.grad, 3.0 * (p_s - p_t) / 6, rtol=1e-9, atol=1e-15)


def test_the_offset_matters_and_large_logits_stay_finite() -> None:
    assert multi_label(TEACHER + 1.0, TEACHER).item() > 0.1
    assert multi_label(torch.tensor([[200.0]]), torch.tensor([[-200.0]])).item() == pytest.approx(200.0)
