from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.logit_mse import LogitMSELoss, logit_mse
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

CASES = [
    Case("logit_mse", logit_mse, (randn(6, 4, seed=1), randn(6, 4, seed=2)), {}, mask=torch.arange(6) % 2 == 0),
    Case(
        "logit_mse tokens", logit_mse, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    student, teacher = randn(6, 4, seed=1), randn(6, 4, seed=2)
    expected = ((student.numpy() - teacher.numpy()) ** 2).mean(1)
    np.testing.assert_allclose(logit_mse(student, teacher, reduction="none").numpy(), expected, rtol=1e-12)
    assert logit_mse(student, teacher, reduction="sum").item() == pytest.approx(expected.sum())


def test_soft_targets_tend_to_it_at_high_temperature() -> None:
    student, teacher = (x - x.mean(1, keepdim=True) for x in (randn(6, 4, seed=1), randn(6, 4, seed=2)))
    # T^2 KL -> sum_c (z_s - z_t)^2 / (2 C)
    assert soft_target(student, teacher, 1e4).item() == pytest.approx(logit_mse(student, teacher).item() / 2, rel=1e-3)


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\)"):
        logit_mse(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        logit_mse(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


def test_the_term_cuts_classes_and_leaves_rows_out() -> None:
    student, teacher = ModelOutput(randn(2, 4, 5)), ModelOutput(randn(2, 4, 7, seed=1))
    keep = torch.tensor([[True, True, False, True], [True, False, False, True]])
    with pytest.raises(ValueError, match="the student has 5 classes and the teacher 7"):
        LogitMSELoss()(student, teacher, {"keep": keep})
    value = LogitMSELoss(classes=5)(student, teacher, {"keep": keep})
    torch.testing.assert_close(value, logit_mse(student.logits[keep], teacher.logits[keep, :5]))
