from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.label_trust import LabelTrustLoss, label_trust
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.types import IGNORE, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
LABELS = torch.tensor([0, 3, 2, 1, 1, 0])
# zero=False: at equality the label's cross-entropy is left
CASES = [
    Case(
        "label trust", label_trust, (STUDENT, TEACHER, LABELS), {"temperature": 2.0}, mask=torch.arange(6) % 2 == 0,
        zero=False,
    ),
    Case(
        "tokens", label_trust, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2), torch.arange(12).view(4, 3) % 5), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1, zero=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_by_scipy(temperature: float) -> None:
    rows, labels = np.arange(6), LABELS.numpy()
    belief = softmax(TEACHER.numpy(), axis=-1)[rows, labels]
    ce = -np.log(softmax(STUDENT.numpy(), axis=-1)[rows, labels])
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    expected = belief * ce + (1 - belief) * temperature**2 * entropy(p_t, p_s, axis=-1)
    found = label_trust(STUDENT, TEACHER, LABELS, temperature, reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert label_trust(STUDENT, TEACHER, LABELS, temperature).item() == pytest.approx(expected.mean())
    assert label_trust(STUDENT, TEACHER, LABELS, temperature, reduction="sum").item() == pytest.approx(expected.sum())


def test_with_soft_targets_beside_it_the_teachers_weight_is_each_examples_own() -> None:
    alpha, ce = 0.3, cross_entropy(STUDENT, LABELS, reduction="none")
    kd = soft_target(STUDENT, TEACHER, 2.0, reduction="none")
    together = (1 - alpha) * label_trust(STUDENT, TEACHER, LABELS, 2.0, reduction="none") + alpha * kd
    belief = TEACHER.softmax(-1)[torch.arange(6), LABELS]
    own = alpha + (1 - alpha) * (1 - belief)
    torch.testing.assert_close(together, (1 - own) * ce + own * kd)


def test_its_ends_are_the_label_and_the_teacher() -> None:
    sure, labels = torch.tensor([[200.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    student = STUDENT[:1, :3]
    torch.testing.assert_close(label_trust(student, sure, labels), cross_entropy(student, labels))
    wrong = torch.tensor([1])  # of which the teacher believes nothing
    torch.testing.assert_close(label_trust(student, sure, wrong), soft_target(student, sure))


def test_an_example_without_a_label_is_the_teachers() -> None:
    labels = LABELS.clone()
    labels[[1, 4]] = IGNORE
    expected = label_trust(STUDENT, TEACHER, LABELS, 2.0, reduction="none")
    expected[[1, 4]] = soft_target(STUDENT, TEACHER, 2.0, reduction="none")[[1, 4]]
    torch.testing.assert_close(label_trust(STUDENT, TEACHER, labels, 2.0, reduction="none"), expected)


def test_the_term() -> None:
    value = LabelTrustLoss(2.0)(ModelOutput(STUDENT), ModelOutput(TEACHER), {"labels": LABELS})
    torch.testing.assert_close(value, label_trust(STUDENT, TEACHER, LABELS, 2.0))
