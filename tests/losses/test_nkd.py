from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from kd_lightning.losses.dkd import dkd
from kd_lightning.losses.nkd import NKDLoss, nkd
from kd_lightning.types import IGNORE, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
LABELS = torch.tensor([0, 3, 2, 1, 1, 0])
# zero=False: both parts are cross-entropies, which at equality are the teacher's entropies
CASES = [
    Case("nkd", nkd, (STUDENT, TEACHER, LABELS), {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0, zero=False),
    Case(
        "two classes", nkd, (STUDENT[:, :2], TEACHER[:, :2], LABELS % 2), {},
        mask=torch.arange(6) % 2 == 0, zero=False,
    ),
    Case(
        "tokens", nkd, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2), torch.arange(12).view(4, 3) % 5), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1, zero=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def by_numpy(temperature: float, gamma: float) -> np.ndarray:
    values = []
    for s, t, y in zip(STUDENT.numpy(), TEACHER.numpy(), LABELS.numpy(), strict=True):
        label = -softmax(t)[y] * np.log(softmax(s)[y])
        rest_s, rest_t = (softmax(np.delete(z, y) / temperature) for z in (s, t))
        values.append(label - gamma * temperature**2 * (rest_t * np.log(rest_s)).sum())
    return np.array(values)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_by_numpy(temperature: float) -> None:
    expected = by_numpy(temperature, 0.7)
    np.testing.assert_allclose(nkd(STUDENT, TEACHER, LABELS, temperature, 0.7, reduction="none"), expected, rtol=1e-9)
    assert nkd(STUDENT, TEACHER, LABELS, temperature, 0.7).item() == pytest.approx(expected.mean())
    assert nkd(STUDENT, TEACHER, LABELS, temperature, 0.7, reduction="sum").item() == pytest.approx(expected.sum())


def test_the_second_part_has_the_gradient_of_dkds() -> None:
    # a cross-entropy and a divergence from the same targets differ by the targets' entropy, a constant
    gradients = []
    for function, one, two in ((nkd, (0.0,), (1.0,)), (dkd, (0.0, 0.0), (0.0, 1.0))):
        student = STUDENT.clone().requires_grad_()
        (function(student, TEACHER, LABELS, 3.0, *two) - function(student, TEACHER, LABELS, 3.0, *one)).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_first_part_pulls_the_label_up_in_proportion_to_the_teachers_belief() -> None:
    student = STUDENT.clone().requires_grad_()
    nkd(student, TEACHER, LABELS, non_target_weight=0.0).backward()
    p_s, p_t = (softmax(z.numpy(), axis=-1) for z in (STUDENT, TEACHER))
    belief = p_t[np.arange(6), LABELS.numpy()][:, None]
    assert student.grad is not None
    np.testing.assert_allclose(student.grad, belief * (p_s - np.eye(4)[LABELS.numpy()]) / 6, rtol=1e-9, atol=1e-15)


def test_with_two_classes_only_the_first_part_is_left() -> None:
    student, teacher, labels = STUDENT[:, :2], TEACHER[:, :2], LABELS % 2
    torch.testing.assert_close(nkd(student, teacher, labels, 3.0, 5.0), nkd(student, teacher, labels, 1.0, 0.0))


def test_examples_without_a_label_do_not_count() -> None:
    labels = LABELS.clone()
    labels[[1, 4]] = IGNORE
    assert nkd(STUDENT, TEACHER, labels).item() == pytest.approx(by_numpy(1.0, 1.5)[[0, 2, 3, 5]].mean())


def test_finite_where_a_side_is_certain() -> None:
    student, teacher = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True), torch.tensor([[-300.0, 300.0, 0.0]])
    for label in range(3):
        value = nkd(student, teacher, torch.tensor([label]))
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_the_term_passes_its_weight_on() -> None:
    value = NKDLoss(2.0, non_target_weight=0.3)(ModelOutput(STUDENT), ModelOutput(TEACHER), {"labels": LABELS})
    torch.testing.assert_close(value, nkd(STUDENT, TEACHER, LABELS, 2.0, 0.3))
