from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.total_variation import total_variation
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
CASES = [
    Case("total_variation", total_variation, (STUDENT, TEACHER), {"temperature": 2.0},
         mask=torch.arange(6) % 2 == 0, near=False),
    Case(
        "total_variation tokens", total_variation, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1, near=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_is_the_largest_difference_over_all_events(temperature: float) -> None:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    events = np.array([[event >> c & 1 for c in range(4)] for event in range(16)])
    expected = temperature * np.abs((p_t - p_s) @ events.T).max(-1)
    np.testing.assert_allclose(total_variation(STUDENT, TEACHER, temperature, reduction="none"), expected, rtol=1e-10)
    assert total_variation(STUDENT, TEACHER, temperature).item() == pytest.approx(expected.mean())
    assert total_variation(STUDENT, TEACHER, temperature, reduction="sum").item() == pytest.approx(expected.sum())


def test_symmetric_and_bounded_by_one_and_by_pinsker() -> None:
    torch.testing.assert_close(total_variation(STUDENT, TEACHER), total_variation(TEACHER, STUDENT))
    values = total_variation(STUDENT, TEACHER, reduction="none")
    assert (values <= (soft_target(STUDENT, TEACHER, reduction="none") / 2).sqrt()).all()
    disjoint = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert total_variation(*disjoint).item() == 1.0


def test_the_gradient_keeps_its_scale_at_high_temperature() -> None:
    gradients = []
    for temperature in (1e3, 1e4):
        student = STUDENT.clone().requires_grad_()
        total_variation(student, TEACHER, temperature).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-5)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 1e-2
