from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy

from kd_lightning.losses.fused_linear import chunked_soft_target
from kd_lightning.losses.generalized_jsd import GeneralizedJSDLoss, generalized_jsd
from kd_lightning.losses.reverse_kl import reverse_kl
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
CASES = [
    *(
        Case(f"beta={beta}", generalized_jsd, (STUDENT, TEACHER), {"temperature": 2.0, "beta": beta},
             mask=torch.arange(6) % 2 == 0)
        for beta in (0.0, 0.3, 1.0)
    ),
    Case(
        "tokens", generalized_jsd, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_value_by_scipy(beta: float, temperature: float) -> None:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    m = beta * p_t + (1 - beta) * p_s
    expected = temperature**2 * (beta * entropy(p_t, m, axis=-1) + (1 - beta) * entropy(p_s, m, axis=-1))
    np.testing.assert_allclose(
        generalized_jsd(STUDENT, TEACHER, temperature, beta, reduction="none"), expected, rtol=1e-9
    )
    assert generalized_jsd(STUDENT, TEACHER, temperature, beta).item() == pytest.approx(expected.mean())
    assert generalized_jsd(STUDENT, TEACHER, temperature, beta, reduction="sum").item() == pytest.approx(expected.sum())


def test_at_a_half_it_is_the_jensen_shannon_divergence() -> None:
    p_s, p_t = (softmax(z.numpy(), axis=-1) for z in (STUDENT, TEACHER))
    expected = jensenshannon(p_t, p_s, axis=-1) ** 2  # scipy gives the distance, its root
    np.testing.assert_allclose(generalized_jsd(STUDENT, TEACHER, reduction="none"), expected, rtol=1e-9)
    torch.testing.assert_close(generalized_jsd(STUDENT, TEACHER), generalized_jsd(TEACHER, STUDENT))
    assert generalized_jsd(1e3 * STUDENT, 1e3 * TEACHER, reduction="none").max() <= math.log(2)


def test_the_ends_are_forward_and_reverse_kl() -> None:
    for reduction in ("mean", "sum", "none"):
        ends = [generalized_jsd(STUDENT, TEACHER, 2.0, beta, reduction=reduction) for beta in (0.0, 1.0)]  # type: ignore[arg-type]
        torch.testing.assert_close(ends[0], soft_target(STUDENT, TEACHER, 2.0, reduction=reduction))  # type: ignore[arg-type]
        torch.testing.assert_close(ends[1], reverse_kl(STUDENT, TEACHER, 2.0, reduction=reduction))  # type: ignore[arg-type]
    mask = torch.arange(6) < 2
    torch.testing.assert_close(
        generalized_jsd(STUDENT, TEACHER, 2.0, 0.0, mask), soft_target(STUDENT, TEACHER, 2.0, mask)
    )


def test_it_is_discontinuous_at_the_ends_and_in_proportion_to_them_nearby() -> None:
    small = 1e-6
    near_0, near_1 = (generalized_jsd(STUDENT, TEACHER, beta=beta).item() for beta in (small, 1 - small))
    forward, reverse = soft_target(STUDENT, TEACHER).item(), reverse_kl(STUDENT, TEACHER).item()
    assert max(near_0, near_1) < 1e-4 < min(forward, reverse)  # tends to 0, not to the value at the end
    assert near_0 / small == pytest.approx(forward, rel=1e-3)
    assert near_1 / small == pytest.approx(reverse, rel=1e-3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_agrees_with_the_fused_loss_in_value_and_gradient(beta: float) -> None:
    results = []
    head = torch.eye(4, dtype=torch.float64)
    for fused in (False, True):
        student = STUDENT.clone().requires_grad_()
        if fused:
            value = chunked_soft_target(student, TEACHER, head, head, temperature=2.0, divergence="jsd", beta=beta)
        else:
            value = generalized_jsd(student, TEACHER, 2.0, beta)
        value.backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_refuses_a_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        generalized_jsd(STUDENT, TEACHER, beta=beta)


def test_the_term_passes_beta_on() -> None:
    value = GeneralizedJSDLoss(2.0, beta=0.2)(ModelOutput(STUDENT), ModelOutput(TEACHER), {})
    torch.testing.assert_close(value, generalized_jsd(STUDENT, TEACHER, 2.0, 0.2))
