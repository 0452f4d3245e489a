from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from kd_lightning.losses.adaptive_kl import AdaptiveKLLoss, adaptive_kl
from kd_lightning.losses.reverse_kl import reverse_kl
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 5, seed=1, scale=2.0), randn(6, 5, seed=2, scale=2.0)
CASES = [
    Case("adaptive_kl", adaptive_kl, (STUDENT, TEACHER), {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0),
    Case(
        "adaptive_kl tokens", adaptive_kl, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {"head_mass": 0.7},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


def weight_of(p_t: np.ndarray, p_s: np.ndarray, head_mass: float) -> float:
    """The head's share of one example's gap, class by class."""
    mass, head, total = 0.0, 0.0, 0.0
    for c in sorted(range(len(p_t)), key=lambda c: -p_t[c]):
        gap = abs(p_t[c] - p_s[c])
        total += gap
        if mass < head_mass:
            head += gap
        mass += p_t[c]
    return head / total


def probabilities(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    return p_s, p_t


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    def test_gradcheck(self, case: Case) -> None:
        """The weight has no gradient, so finite differences, which move it, say something else: see below."""
        student = case.tensors[0].clone().requires_grad_()
        assert not torch.autograd.gradcheck(lambda x: case(x, *case.tensors[1:]), (student,), raise_exception=False)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("head_mass", [0.2, 0.5, 0.9])
def test_value_class_by_class(head_mass: float, temperature: float) -> None:
    p_s, p_t = probabilities(temperature)
    w = np.array([weight_of(t, s, head_mass) for t, s in zip(p_t, p_s, strict=True)])
    expected = temperature**2 * (w * entropy(p_t, p_s, axis=-1) + (1 - w) * entropy(p_s, p_t, axis=-1))
    options = {"temperature": temperature, "head_mass": head_mass}
    np.testing.assert_allclose(adaptive_kl(STUDENT, TEACHER, **options, reduction="none"), expected, rtol=1e-9)
    assert adaptive_kl(STUDENT, TEACHER, **options).item() == pytest.approx(expected.mean())
    assert adaptive_kl(STUDENT, TEACHER, **options, reduction="sum").item() == pytest.approx(expected.sum())


def test_the_gradient_takes_the_weights_as_constants() -> None:
    temperature, (p_s, p_t) = 2.0, probabilities(2.0)
    w = np.array([[weight_of(t, s, 0.5)] for t, s in zip(p_t, p_s, strict=True)])
    ratio = np.log(p_s / p_t)
    reverse = p_s * (ratio - (p_s * ratio).sum(-1, keepdims=True))
    expected = temperature * (w * (p_s - p_t) + (1 - w) * reverse) / len(p_s)
    student = STUDENT.clone().requires_grad_()
    adaptive_kl(student, TEACHER, temperature).backward()
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_the_class_that_reaches_the_mass_belongs_to_the_head() -> None:
    # sorted 0.4, 0.35, 0.25: the first alone has less than a half, so the head is two classes with all but 0.05 of 0.2
    teacher, student = (
        torch.tensor([[0.4, 0.35, 0.25]]).double().log(),
        torch.tensor([[0.4, 0.25, 0.35]]).double().log(),
    )
    w = 0.1 / 0.2
    expected = w * soft_target(student, teacher) + (1 - w) * reverse_kl(student, teacher)
    torch.testing.assert_close(adaptive_kl(student, teacher), expected)


def test_the_whole_head_is_forward_kl() -> None:
    teacher, student = (
        torch.tensor([[0.6, 0.4 - 1e-9, 1e-9]]).double().log(),
        torch.tensor([[0.4, 0.6 - 1e-9, 1e-9]]).double().log(),
    )
    torch.testing.assert_close(adaptive_kl(student, teacher, head_mass=0.9), soft_target(student, teacher))


def test_with_two_classes_it_is_the_mean_of_both_divergences() -> None:
    student, teacher = STUDENT[:, :2], TEACHER[:, :2]
    expected = (soft_target(student, teacher, 2.0) + reverse_kl(student, teacher, 2.0)) / 2
    torch.testing.assert_close(adaptive_kl(student, teacher, 2.0), expected)


@pytest.mark.parametrize("head_mass", [0.0, 1.0, -0.5])
def test_refuses_a_mass_out_of_range(head_mass: float) -> None:
    with pytest.raises(ValueError, match=r"head_mass must be in \(0, 1\)"):
        adaptive_kl(STUDENT, TEACHER, head_mass=head_mass)


def test_the_term_passes_its_mass_on() -> None:
    value = AdaptiveKLLoss(2.0, head_mass=0.9)(ModelOutput(STUDENT), ModelOutput(TEACHER), {})
    torch.testing.assert_close(value, adaptive_kl(STUDENT, TEACHER, 2.0, 0.9))
    assert value.item() != pytest.approx(adaptive_kl(STUDENT, TEACHER, 2.0).item(), rel=1e-6)
