from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from kd_lightning.losses.correlation_congruence import CorrelationCongruenceLoss, correlation_congruence
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.relations import STUDENT, TEACHER, Relations, check_term

PAIR = (STUDENT, randn(6, 4, seed=2))
# Not means: examples are related to one another, so half a batch has other relations than the whole.
CASES = [
    Case("correlation_congruence", correlation_congruence, PAIR, {}, mean=False),
    Case("third order", correlation_congruence, PAIR, {"gamma": 1.5, "order": 3}, mean=False),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("loss", [correlation_congruence])
class TestRelations(Relations):
    pass


def test_value_by_numpy() -> None:
    def kernel(feature: np.ndarray) -> np.ndarray:
        values = np.zeros((6, 6))
        for i, a in enumerate(feature):
            for j, b in enumerate(feature):
                cosine = a @ b / np.sqrt((a @ a) * (b @ b))
                values[i, j] = math.exp(-0.8) * (1 + 0.8 * cosine + 0.32 * cosine**2)
        return values

    expected = np.square(kernel(STUDENT.numpy()) - kernel(TEACHER.numpy())).mean()
    assert correlation_congruence(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


def test_it_tends_to_the_gaussian_kernel() -> None:
    def gaussian(feature: torch.Tensor) -> torch.Tensor:
        directions = feature / feature.norm(dim=1, keepdim=True)
        return torch.exp(-0.4 * (directions.unsqueeze(0) - directions.unsqueeze(1)).square().sum(2))

    expected = (gaussian(STUDENT) - gaussian(TEACHER)).square().mean()
    torch.testing.assert_close(correlation_congruence(STUDENT, TEACHER, order=12), expected, rtol=1e-9, atol=0.0)


def test_examples_may_be_scaled_each_by_its_own() -> None:
    lengths = torch.tensor([0.1, 1.0, 2.0, 3.0, 5.0, 9.0], dtype=torch.float64).unsqueeze(1)
    value = correlation_congruence(STUDENT * lengths, TEACHER)
    torch.testing.assert_close(value, correlation_congruence(STUDENT, TEACHER))


def test_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match="gamma must be a positive number, got 0"):
        correlation_congruence(STUDENT, TEACHER, gamma=0)
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        correlation_congruence(STUDENT, TEACHER, order=0)


def test_the_term() -> None:
    check_term(CorrelationCongruenceLoss(), correlation_congruence)
    check_term(CorrelationCongruenceLoss(gamma=1.0, order=1), partial(correlation_congruence, gamma=1.0, order=1))
