from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import pearsonr

from kd_lightning.losses.dist import DISTLoss, dist
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
MASK = torch.arange(6) % 2 == 0
INTER, INTRA = {"inter_weight": 1.0, "intra_weight": 0.0}, {"inter_weight": 0.0, "intra_weight": 1.0}
# near=False: a class is constant where it is certain of all examples but for rounding
# mean=False: the intra-class part correlates over the batch, so that a batch is more than its examples
CASES = [
    Case("dist", dist, (STUDENT, TEACHER), {"temperature": 2.0}, mask=MASK, mean=False, near=False),
    Case("inter-class", dist, (STUDENT, TEACHER), INTER, mask=MASK, near=False),
    Case("intra-class", dist, (STUDENT, TEACHER), INTRA, mask=MASK, mean=False, near=False),
    Case("two classes", dist, (STUDENT[:, :2], TEACHER[:, :2]), {}, mask=MASK, mean=False, near=False),
    Case(
        "tokens", dist, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1, mean=False, near=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def probabilities(temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    return p_s, p_t


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over rows of 1 - Pearson's correlation, by scipy."""
    return float(np.mean([1 - pearsonr(x, y).statistic for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_by_scipy(temperature: float) -> None:
    p_s, p_t = probabilities(temperature)
    inter, intra = distance(p_s, p_t), distance(p_s.T, p_t.T)
    assert dist(STUDENT, TEACHER, temperature, 1.0, 0.0).item() == pytest.approx(inter, rel=1e-9)
    assert dist(STUDENT, TEACHER, temperature, 0.0, 1.0).item() == pytest.approx(intra, rel=1e-9)
    assert dist(STUDENT, TEACHER, temperature, 0.5, 2.0).item() == pytest.approx(0.5 * inter + 2.0 * intra, rel=1e-9)


def test_only_examples_that_count_are_correlated() -> None:
    p_s, p_t = (p[MASK.numpy()] for p in probabilities())
    expected = distance(p_s, p_t) + distance(p_s.T, p_t.T)
    assert dist(STUDENT, TEACHER, mask=MASK).item() == pytest.approx(expected, rel=1e-9)


def test_positive_affine_maps_of_predictions_cost_nothing() -> None:
    p_t = TEACHER.softmax(-1)
    scales = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7, 0.2], dtype=torch.float64).unsqueeze(1)
    each_its_own = (scales * p_t + (1 - scales) / 4).log()  # an offset and a scale for every example
    assert dist(each_its_own, TEACHER, **INTER).item() == pytest.approx(0.0, abs=1e-12)
    assert dist(each_its_own, TEACHER, **INTRA).item() > 1e-3
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    one_for_all = (0.3 * p_t + 0.7 * prior).log()  # an offset for every class, one scale
    assert dist(one_for_all, TEACHER, **INTRA).item() == pytest.approx(0.0, abs=1e-12)
    assert dist(one_for_all, TEACHER, **INTER).item() > 1e-3


def test_at_high_temperature_positive_affine_maps_of_logits_cost_nothing() -> None:
    mapped = 3.0 * TEACHER - 5.0
    assert dist(mapped, TEACHER, 1e4).item() == pytest.approx(0.0, abs=1e-6)
    assert dist(mapped, TEACHER, 1.0).item() > 1e-3
    assert dist(-TEACHER, TEACHER, 1e4).item() == pytest.approx(4.0, abs=1e-3)  # the most: both correlations -1


def test_the_gradient_keeps_its_scale_at_high_temperature() -> None:
    gradients = []
    for temperature in (1e3, 1e4):
        student = STUDENT.clone().requires_grad_()
        dist(student, TEACHER, temperature).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-4)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 1e-2


def test_with_two_classes_only_the_second_part_has_a_gradient() -> None:
    student = STUDENT[:, :2].clone().requires_grad_()
    inter = dist(student, TEACHER[:, :2], **INTER)
    (gradient,) = torch.autograd.grad(inter, student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0.0)
    disagree = (STUDENT[:, 0] > STUDENT[:, 1]) != (TEACHER[:, 0] > TEACHER[:, 1])
    assert inter.item() == pytest.approx(2 * disagree.double().mean().item())


def test_the_gradient_where_a_class_is_far_below_the_top_in_all_examples() -> None:
    student = torch.tensor([[0.0, 0.5, -47.0], [0.3, 0.0, -48.0]], requires_grad=True)
    value = dist(student, torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, 1.0]]))
    value.backward()
    assert value.item() == pytest.approx(1.7961, abs=1e-4)
    expected = torch.tensor([[0.2126, -0.2126, 0.0], [-0.2357, 0.2357, 0.0]])
    torch.testing.assert_close(student.grad, expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("scale", [3.0, 10.0, 30.0])
def test_many_classes_of_any_spread_in_float32_as_in_float64(scale: float) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        student = randn(32, 1000, seed=1, scale=scale).float().to(dtype).requires_grad_()
        value = dist(student, randn(32, 1000, seed=2, scale=scale).float().to(dtype))
        (gradient,) = torch.autograd.grad(value, student)
        found.append((value.item(), gradient.double()))
    (value, gradient), (exact, expected) = found
    assert value == pytest.approx(exact, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 4), (torch.float32, 11), (torch.float64, 7)])
def test_what_does_not_vary_is_no_distance_and_has_no_gradient(dtype: torch.dtype, classes: int) -> None:
    # of 11 and of 7 equal numbers the mean is another by rounding, and that is no variation
    teacher = randn(6, classes, seed=2).to(dtype)
    student = torch.full((6, classes), 0.3, dtype=dtype, requires_grad=True)
    for uniform in (dist(student, teacher), dist(student, torch.zeros_like(teacher))):
        (gradient,) = torch.autograd.grad(uniform, student)
        assert uniform.item() == 0.0
        assert (gradient == 0).all()


def test_of_one_example_there_is_no_second_part() -> None:
    student, teacher = STUDENT[:1].clone().requires_grad_(), TEACHER[:1]
    one = dist(student, teacher, **INTRA)
    one.backward()
    assert one.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_the_term_passes_its_weights_on() -> None:
    value = DISTLoss(2.0, inter_weight=0.3, intra_weight=2.0)(ModelOutput(STUDENT), ModelOutput(TEACHER), {})
    torch.testing.assert_close(value, dist(STUDENT, TEACHER, 2.0, 0.3, 2.0))
