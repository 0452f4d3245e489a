from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kd_lightning.losses.rkd import RKDAngleLoss, RKDDistanceLoss, rkd_angle, rkd_distance
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.relations import STUDENT, TEACHER, Loss, Relations, check_term

# Not means: examples are related to one another, so half a batch has other relations than the whole.
CASES = [
    Case("rkd_distance", rkd_distance, (STUDENT, randn(6, 4, seed=2)), {}, mean=False),
    Case("rkd_angle", rkd_angle, (STUDENT, randn(6, 4, seed=2)), {}, mean=False),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("loss", [rkd_distance])
class TestDistances(Relations):
    pass


@pytest.mark.parametrize("loss", [rkd_angle])
class TestAngles(Relations):
    smallest = 3


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def test_distances_by_numpy() -> None:
    def relative(feature: np.ndarray) -> np.ndarray:
        distances = np.array([np.linalg.norm(a - b) for a, b in itertools.permutations(feature, 2)])
        return distances / distances.mean()

    pairs = zip(relative(STUDENT.numpy()), relative(TEACHER.numpy()), strict=True)
    expected = np.mean([huber(s - t) for s, t in pairs])
    assert rkd_distance(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


def test_angles_by_numpy() -> None:
    def cosines(feature: np.ndarray) -> list[float]:
        triplets = itertools.permutations(feature, 3)
        return [(a - b) @ (c - b) / np.linalg.norm(a - b) / np.linalg.norm(c - b) for a, b, c in triplets]

    expected = np.mean([huber(s - t) for s, t in zip(cosines(STUDENT), cosines(TEACHER), strict=True)])
    assert rkd_angle(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_a_shifted_feature_space_is_the_same(loss: Loss) -> None:
    torch.testing.assert_close(loss(STUDENT + 5.0, TEACHER - 3.0), loss(STUDENT, TEACHER))


def test_a_pair_at_distance_zero_counts() -> None:
    # psi is (0, 3/2, 3/2) where two of three examples are at one point, (1, 1, 1) in an equilateral triangle.
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    teacher = torch.eye(3, dtype=torch.float64)
    assert rkd_distance(student, teacher).item() == pytest.approx((huber(-1.0) + 2 * huber(0.5)) / 3)


def test_a_triplet_with_two_examples_at_one_point_has_the_cosine_zero() -> None:
    # Corners 0, 0 and p: no triplet of distinct points is left, so the student's cosines are 0 but at the corner p,
    # which sees both others in one direction: 1. The teacher's are all 1/2.
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert rkd_angle(student, torch.eye(3, dtype=torch.float64)).item() == pytest.approx(huber(0.5))


def test_equal_examples_are_at_distance_zero_in_float32_far_from_the_origin() -> None:
    student = torch.full((4, 64), 1000.123).requires_grad_()
    value = rkd_distance(student, torch.eye(4))
    value.backward()
    assert value.item() == pytest.approx(huber(1.0))  # psi: 0 against 1
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_the_terms() -> None:
    check_term(RKDDistanceLoss(), rkd_distance)
    check_term(RKDAngleLoss(), rkd_angle)
