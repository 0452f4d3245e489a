from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from kd_lightning.losses.fused_linear import chunked_soft_target
from kd_lightning.losses.reverse_kl import reverse_kl
from kd_lightning.losses.soft_target import soft_target
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
CASES = [
    Case("reverse_kl", reverse_kl, (STUDENT, TEACHER), {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0),
    Case(
        "reverse_kl tokens", reverse_kl, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_is_scipys_relative_entropy_times_t_squared(temperature: float) -> None:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    expected = temperature**2 * entropy(p_s, p_t, axis=-1)
    np.testing.assert_allclose(reverse_kl(STUDENT, TEACHER, temperature, reduction="none"), expected, rtol=1e-10)
    assert reverse_kl(STUDENT, TEACHER, temperature).item() == pytest.approx(expected.mean())
    assert reverse_kl(STUDENT, TEACHER, temperature, reduction="sum").item() == pytest.approx(expected.sum())


def test_it_is_forward_kl_with_the_sides_exchanged() -> None:
    torch.testing.assert_close(reverse_kl(STUDENT, TEACHER, 3.0), soft_target(TEACHER, STUDENT, 3.0))


def test_the_gradient() -> None:
    # T^2 d KL(p_s || p_t) / d z_s = T p_s (log(p_s / p_t) - KL)
    student = STUDENT.clone().requires_grad_()
    reverse_kl(student, TEACHER, 3.0).backward()
    p_s, p_t = (softmax(z.numpy() / 3.0, axis=-1) for z in (STUDENT, TEACHER))
    ratio = np.log(p_s / p_t)
    expected = 3.0 * p_s * (ratio - (p_s * ratio).sum(-1, keepdims=True)) / len(p_s)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_it_prefers_one_mode_where_forward_kl_prefers_to_cover_both() -> None:
    teacher = torch.tensor([[0.495, 0.01, 0.495]]).log()
    one_mode, between = torch.tensor([[0.98, 0.01, 0.01]]).log(), torch.tensor([[0.34, 0.32, 0.34]]).log()
    assert reverse_kl(one_mode, teacher) < reverse_kl(between, teacher)
    assert soft_target(one_mode, teacher) > soft_target(between, teacher)


def test_agrees_with_the_fused_loss() -> None:
    head = torch.eye(4, dtype=torch.float64)
    fused = chunked_soft_target(STUDENT, TEACHER, head, head, temperature=2.0, divergence="reverse_kl")
    torch.testing.assert_close(reverse_kl(STUDENT, TEACHER, 2.0), fused)
