from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from kd_lightning.losses.dkd import DKDLoss, dkd
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.types import IGNORE, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
LABELS = torch.tensor([0, 3, 2, 1, 1, 0])
CASES = [
    Case("dkd", dkd, (STUDENT, TEACHER, LABELS), {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0),
    Case("two classes", dkd, (STUDENT[:, :2], TEACHER[:, :2], LABELS % 2), {}, mask=torch.arange(6) % 2 == 0),
    Case(
        "tokens", dkd, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2), torch.arange(12).view(4, 3) % 5), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def parts(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The target's and the others' divergence of every example, from probabilities."""
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    target, others = [], []
    for s, t, y in zip(p_s, p_t, LABELS.numpy(), strict=True):
        target.append(entropy([t[y], 1 - t[y]], [s[y], 1 - s[y]]))
        others.append(entropy(np.delete(t, y) / (1 - t[y]), np.delete(s, y) / (1 - s[y])))
    return temperature**2 * np.array(target), temperature**2 * np.array(others)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_from_probabilities(temperature: float) -> None:
    target, others = parts(temperature)
    expected = 0.7 * target + 3.0 * others
    value = dkd(STUDENT, TEACHER, LABELS, temperature, 0.7, 3.0, reduction="none")
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert dkd(STUDENT, TEACHER, LABELS, temperature, 0.7, 3.0).item() == pytest.approx(expected.mean())
    assert dkd(STUDENT, TEACHER, LABELS, temperature, 0.7, 3.0, reduction="sum").item() == pytest.approx(expected.sum())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_soft_targets_where_the_others_weigh_what_the_teacher_leaves_them(temperature: float) -> None:
    student = STUDENT.clone().requires_grad_()
    left = 1 - softmax(TEACHER.numpy() / temperature, axis=-1)[np.arange(6), LABELS.numpy()]
    target = dkd(student, TEACHER, LABELS, temperature, 1.0, 0.0, reduction="none")
    others = dkd(student, TEACHER, LABELS, temperature, 0.0, 1.0, reduction="none")
    decoupled = target + torch.from_numpy(left) * others
    whole = soft_target(student, TEACHER, temperature, reduction="none")
    torch.testing.assert_close(decoupled, whole)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (decoupled, whole)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_with_two_classes_the_second_part_is_empty() -> None:
    student, teacher, labels = STUDENT[:, :2].clone().requires_grad_(), TEACHER[:, :2], LABELS % 2
    others = dkd(student, teacher, labels, 2.0, 0.0, 8.0)
    others.backward()
    assert others.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()
    torch.testing.assert_close(dkd(student, teacher, labels, 2.0, 0.5), 0.5 * soft_target(student, teacher, 2.0))


def test_examples_without_a_label_do_not_count() -> None:
    labels = LABELS.clone()
    labels[[1, 4]] = IGNORE
    expected = (parts(1.0)[0] + 8.0 * parts(1.0)[1])[[0, 2, 3, 5]]
    assert dkd(STUDENT, TEACHER, labels).item() == pytest.approx(expected.mean())
    assert (dkd(STUDENT, TEACHER, labels, reduction="none")[[1, 4]] == 0).all()


def test_finite_where_a_side_is_certain() -> None:
    student, teacher = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True), torch.tensor([[-300.0, 300.0, 0.0]])
    for label in range(3):
        value = dkd(student, teacher, torch.tensor([label]))
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


def test_the_term_passes_its_weights_on() -> None:
    term = DKDLoss(2.0, target_weight=0.3, non_target_weight=2.0)
    value = term(ModelOutput(STUDENT), ModelOutput(TEACHER), {"labels": LABELS})
    torch.testing.assert_close(value, dkd(STUDENT, TEACHER, LABELS, 2.0, 0.3, 2.0))
