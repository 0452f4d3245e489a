from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kd_lightning.losses.regression import RegressionLoss, regression
from kd_lightning.training.objective import Objective
from kd_lightning.types import IGNORE, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, seed=1, scale=2.0), randn(6, seed=2, scale=2.0)
MASK = torch.arange(6) % 2 == 0
CASES = [
    Case("mse", regression, (STUDENT, TEACHER), {}, mask=MASK),
    Case("smooth_l1", regression, (STUDENT, TEACHER), {"kind": "smooth_l1", "threshold": 0.5}, mask=MASK),
    Case("several scores", regression, (randn(6, 3, seed=1), randn(6, 3, seed=2)), {}, mask=MASK),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    d = STUDENT.numpy() - TEACHER.numpy()
    huber = np.where(np.abs(d) < 0.7, d**2 / 1.4, np.abs(d) - 0.35)
    assert (np.abs(d) < 0.7).any()
    assert (np.abs(d) > 0.7).any()
    np.testing.assert_allclose(regression(STUDENT, TEACHER, reduction="none"), d**2, rtol=1e-12)
    np.testing.assert_allclose(regression(STUDENT, TEACHER, "smooth_l1", 0.7, reduction="none"), huber, rtol=1e-12)
    assert regression(STUDENT, TEACHER, "smooth_l1", 0.7).item() == pytest.approx(huber.mean())
    assert regression(STUDENT, TEACHER, reduction="sum").item() == pytest.approx((d**2).sum())


def test_several_scores_are_averaged_within_an_example() -> None:
    student, teacher = randn(6, 3, seed=1), randn(6, 3, seed=2)
    expected = ((student.numpy() - teacher.numpy()) ** 2).mean(1)
    np.testing.assert_allclose(regression(student, teacher, reduction="none"), expected, rtol=1e-12)
    assert regression(student, teacher, mask=MASK).item() == pytest.approx(expected[MASK.numpy()].mean())


def test_a_column_and_a_vector_are_the_same() -> None:
    expected = regression(STUDENT, TEACHER)
    for student in (STUDENT, STUDENT.unsqueeze(1)):
        for teacher in (TEACHER, TEACHER.unsqueeze(1)):
            value = RegressionLoss()(ModelOutput(student), ModelOutput(teacher), {})
            torch.testing.assert_close(value, expected)


def test_labels_count_where_there_are_any() -> None:
    term = RegressionLoss("smooth_l1", 0.5, target="labels")
    assert not Objective({"labels": term}, {"labels": 1.0}).uses_teacher
    labels = TEACHER.clone()
    labels[1], labels[4] = math.nan, IGNORE
    known = torch.tensor([0, 2, 3, 5])
    student = STUDENT.unsqueeze(1).requires_grad_()
    for given in (labels, labels.unsqueeze(1)):
        value = term(ModelOutput(student), ModelOutput(torch.zeros(0)), {"labels": given})
        torch.testing.assert_close(value, regression(STUDENT[known], TEACHER[known], "smooth_l1", 0.5))
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.isfinite(gradient).all()
    assert (gradient[[1, 4]] == 0).all()


def test_several_labels_count_where_all_are_known() -> None:
    student, labels = randn(3, 2, seed=1), randn(3, 2, seed=2)
    labels[1, 0] = math.nan
    value = RegressionLoss(target="labels")(ModelOutput(student), ModelOutput(student), {"labels": labels})
    torch.testing.assert_close(value, regression(student[[0, 2]], labels[[0, 2]]))


@pytest.mark.parametrize("batch", [{}, {"labels": torch.full((6,), math.nan)}, {"labels": torch.full((6,), IGNORE)}])
def test_without_labels_it_is_a_zero_with_a_graph(batch: dict[str, torch.Tensor]) -> None:
    student = STUDENT.clone().requires_grad_()
    value = RegressionLoss(target="labels")(ModelOutput(student), ModelOutput(student), batch)
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_whole_numbers_are_scores_too() -> None:
    value = RegressionLoss(target="labels")(ModelOutput(STUDENT), ModelOutput(STUDENT), {"labels": torch.arange(6)})
    torch.testing.assert_close(value, regression(STUDENT, torch.arange(6).double()))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"student scores \(6,\) and teacher scores \(6, 2\)"):
        regression(STUDENT, torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(6,\)"):
        regression(STUDENT, TEACHER, mask=MASK[:3])
    with pytest.raises(ValueError, match="kind must be mse or smooth_l1, got 'l1'"):
        regression(STUDENT, TEACHER, "l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold must be a positive number, got 0"):
        regression(STUDENT, TEACHER, threshold=0.0)
    with pytest.raises(ValueError, match="target must be teacher or labels, got 'both'"):
        RegressionLoss(target="both")  # type: ignore[arg-type]


def test_of_tokens_only_those_that_are_kept_count() -> None:
    keep = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    student, teacher = (randn(2, 3, 4, seed=seed) for seed in (1, 2))
    expected = (student - teacher)[keep].square().mean()
    hidden = [x.masked_fill(~keep.unsqueeze(2), math.nan) for x in (student, teacher)]
    logits = hidden[0].requires_grad_()
    term, batch = RegressionLoss(), {"keep": keep}
    value = term(ModelOutput(logits), ModelOutput(hidden[1]), batch)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value.detach(), expected)
    assert gradient.isfinite().all()
    assert not gradient[~keep].any()
    assert term.counts(batch).tolist() == [3.0]
