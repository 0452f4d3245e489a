from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.similarity_preserving import SimilarityPreservingLoss, similarity_preserving
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.relations import STUDENT, TEACHER, Relations, check_term

# Not a mean: examples are related to one another, so half a batch has other relations than the whole.
CASES = [Case("similarity_preserving", similarity_preserving, (STUDENT, randn(6, 4, seed=2)), {}, mean=False)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("loss", [similarity_preserving])
class TestRelations(Relations):
    pass


def test_value_by_numpy() -> None:
    def similarities(feature: np.ndarray) -> np.ndarray:
        rows = [[sum(a * b) for b in feature] for a in feature]
        return np.array([np.array(row) / np.sqrt(sum(x * x for x in row)) for row in rows])

    expected = ((similarities(STUDENT.numpy()) - similarities(TEACHER.numpy())) ** 2).sum() / 36
    assert similarity_preserving(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


def test_unlike_on_one_side_and_all_alike_on_the_other() -> None:
    # Rows of the identity against rows of 1 / sqrt(B): 2 - 2 / sqrt(B) for each row, over B^2.
    value = similarity_preserving(torch.eye(4).double(), torch.ones(4, 2).double())
    assert value.item() == pytest.approx((2 - 2 / 2) / 4)


def test_the_term() -> None:
    check_term(SimilarityPreservingLoss(), similarity_preserving)
