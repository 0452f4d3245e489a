from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from kd_lightning.losses.pkt import PKTLoss, pkt
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.relations import STUDENT, TEACHER, Relations, check_term

# Not a mean: examples are related to one another, so half a batch has other relations than the whole.
CASES = [Case("pkt", pkt, (STUDENT, randn(6, 4, seed=2)), {}, mean=False)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("loss", [pkt])
class TestRelations(Relations):
    pass


def neighbours(feature: np.ndarray, j: int) -> np.ndarray:
    """p(. | j): the affinities of all others to example j, scaled to sum to 1."""
    cosines = [a @ feature[j] / np.linalg.norm(a) / np.linalg.norm(feature[j]) for a in np.delete(feature, j, 0)]
    affinities = (np.array(cosines) + 1) / 2
    return affinities / affinities.sum()


def test_value_by_scipy() -> None:
    student, teacher = STUDENT.numpy(), TEACHER.numpy()
    expected = np.mean([entropy(neighbours(teacher, j), neighbours(student, j)) for j in range(6)])
    assert pkt(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-9)


def test_examples_may_be_scaled_each_by_its_own() -> None:
    lengths = torch.tensor([0.1, 1.0, 2.0, 3.0, 5.0, 9.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(pkt(STUDENT * lengths, TEACHER), pkt(STUDENT, TEACHER))


def test_two_examples_have_but_one_neighbour() -> None:
    assert pkt(STUDENT[:2], TEACHER[:2]).item() == pytest.approx(0.0, abs=1e-12)


def test_opposite_vectors_are_finite_on_either_side() -> None:
    line = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    for student, teacher in ((line, STUDENT[:3]), (STUDENT[:3], line)):
        student = student.clone().requires_grad_()
        value = pkt(student, teacher)
        value.backward()
        assert 0 < value.item() < 20
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()


def test_the_term() -> None:
    check_term(PKTLoss(), pkt)
