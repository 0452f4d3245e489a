from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy, zscore
from torch import Tensor

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.dkd import DKDLoss, dkd
from kd_lightning.losses.logit_mse import LogitMSELoss
from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target
from kd_lightning.losses.standardized import StandardizedLoss, standardized
from kd_lightning.losses.term import Depth, Term
from kd_lightning.training.schedules import Linear
from kd_lightning.types import Batch, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
OUTPUTS = ModelOutput(STUDENT), ModelOutput(TEACHER)


def standardized_soft_target(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return soft_target(standardized(student), standardized(teacher), **options)


CASES = [
    Case(
        "standardized", standardized_soft_target, (STUDENT, TEACHER), {"temperature": 2.0},
        mask=torch.arange(6) % 2 == 0,
    ),
    Case(
        "tokens", standardized_soft_target, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_z_scores_are_scipys() -> None:
    np.testing.assert_allclose(standardized(STUDENT), zscore(STUDENT.numpy(), axis=-1), rtol=1e-7)
    tokens = randn(2, 3, 5)
    np.testing.assert_allclose(standardized(tokens), zscore(tokens.numpy(), axis=-1), rtol=1e-7)


def test_value_by_scipy() -> None:
    p_s, p_t = (softmax(zscore(z.numpy(), axis=-1) / 2.0, axis=-1) for z in (STUDENT, TEACHER))
    value = StandardizedLoss(SoftTargetLoss(2.0))(*OUTPUTS, {})
    assert value.item() == pytest.approx(4.0 * entropy(p_t, p_s, axis=-1).mean(), rel=1e-6)


def test_scale_and_offset_of_an_examples_logits_do_not_matter() -> None:
    scales, offsets = randn(6, 1, seed=3).exp(), 10 * randn(6, 1, seed=4)
    torch.testing.assert_close(standardized(scales * STUDENT + offsets), standardized(STUDENT), rtol=1e-6, atol=1e-6)
    term = StandardizedLoss(SoftTargetLoss(2.0))
    assert term(ModelOutput(scales * TEACHER + offsets), OUTPUTS[1], {}).item() == pytest.approx(0.0, abs=1e-9)
    assert soft_target(scales * TEACHER + offsets, TEACHER, 2.0).item() > 1e-2


def test_equal_logits_give_zeros_and_a_finite_gradient() -> None:
    logits = torch.full((2, 4), 3.0, requires_grad=True)
    soft_target(standardized(logits), torch.eye(4)[:2]).backward()
    assert (standardized(logits) == 0).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_with_two_classes_only_the_sign_is_left_and_connecting_warns() -> None:
    student, teacher = ModelOutput(STUDENT[:, :2].clone().requires_grad_()), ModelOutput(TEACHER[:, :2])
    signs = torch.sign(STUDENT[:, :2] - STUDENT[:, :2].mean(-1, keepdim=True))
    torch.testing.assert_close(standardized(student.logits.detach()), signs, rtol=0.0, atol=1e-5)
    term = StandardizedLoss(SoftTargetLoss(2.0))
    (gradient,) = torch.autograd.grad(term(student, teacher, {}), student.logits)
    assert gradient.abs().max() < 1e-5
    with pytest.warns(UserWarning, match="there are 2 classes, and their z-scores are 1 and -1"):
        term.connect(student, teacher, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term.connect(*OUTPUTS, 6)


def test_in_front_of_other_terms_and_only_of_the_classes_they_compare() -> None:
    labels = torch.tensor([0, 3, 2, 1, 1, 0])
    z_s, z_t = standardized(STUDENT), standardized(TEACHER)
    value = StandardizedLoss(DKDLoss(3.0))(*OUTPUTS, {"labels": labels})
    torch.testing.assert_close(value, dkd(z_s, z_t, labels, 3.0))
    torch.testing.assert_close(StandardizedLoss(LogitMSELoss())(*OUTPUTS, {}), (z_s - z_t).square().mean())
    cut = StandardizedLoss(SoftTargetLoss(2.0, classes=3))
    padded = ModelOutput(torch.cat([STUDENT[:, :3], torch.full((6, 2), -50.0)], 1)), OUTPUTS[1]
    torch.testing.assert_close(
        cut(*padded, {}), soft_target(standardized(STUDENT[:, :3]), standardized(TEACHER[:, :3]), 2.0)
    )


class Recorder(Term):
    """A term that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.connected_with = 0

    def plan(self, student: Depth, teacher: Depth) -> None:
        self.needs_student, self.needs_teacher = (f"hidden[{student('hidden')}]",), (f"hidden[{teacher('hidden')}]",)

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        self.connected_with = examples

    def settings(self) -> dict[str, float]:
        return {"progress": self.progress}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        return student.features["pooled"].sum() * self.progress


def test_the_wrapped_term_is_told_everything() -> None:
    term = StandardizedLoss(Recorder())
    term.plan(lambda kind: 2, lambda kind: 4)
    assert (term.needs_student, term.needs_teacher) == (("hidden[2]",), ("hidden[4]",))
    student = ModelOutput(STUDENT, {"pooled": torch.ones(6, 3)})
    term.connect(student, OUTPUTS[1], 17)
    assert term.term.connected_with == 17
    term.progress = 0.5
    assert term.settings() == {"progress": 0.5}
    term.progress = 0.25
    assert term(student, OUTPUTS[1], {}).item() == 18 * 0.25
    assert term.uses_teacher
    assert not StandardizedLoss(CrossEntropyLoss()).uses_teacher


def test_the_temperature_follows_its_schedule() -> None:
    term = StandardizedLoss(SoftTargetLoss(Linear(start=8.0, end=2.0)))
    term.progress = 0.5
    assert term.settings() == {"temperature": 5.0}
    torch.testing.assert_close(term(*OUTPUTS, {}), standardized_soft_target(STUDENT, TEACHER, temperature=5.0))
