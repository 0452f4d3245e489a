from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.review_kd import AttentionFusion, ReviewKDLoss, review_kd
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
CASES = [
    Case("review_kd", review_kd, MAPS, {}),
    Case("another size", review_kd, (randn(4, 3, 6, 6, seed=1), randn(4, 3, 3, 3, seed=2)), {}),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    s, t = (x.numpy() for x in MAPS)
    expected = np.zeros(4)
    for weight, block in ((1.0, 1), (0.5, 2), (0.25, 4), (0.125, 8)):
        pooled = [x.reshape(4, 3, 8 // block, block, 8 // block, block).mean((3, 5)) for x in (s, t)]
        expected += weight * ((pooled[0] - pooled[1]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(review_kd(*MAPS, "none"), expected / 1.875, rtol=1e-12)


def test_a_constant_difference_is_its_square_at_every_scale() -> None:
    for size in (1, 2, 3, 4, 9):
        teacher = randn(2, 3, size, size)
        assert review_kd(teacher + 3, teacher).item() == pytest.approx(9.0)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student map \(2, 3\) and teacher map \(2, 3\)"):
        review_kd(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"student map \(2, 3, 4, 4\) and teacher map \(2, 5, 4, 4\)"):
        review_kd(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match="width=0 must be at least 1"):
        ReviewKDLoss(width=0)


def test_fusion_weighs_the_two_at_each_place() -> None:
    torch.manual_seed(0)
    fusion = AttentionFusion(3, 4, 5, deepest=False).eval()
    stage, deeper = randn(2, 3, 4, 4).float(), randn(2, 4, 2, 2, seed=1).float()
    compared, handed = fusion(stage, deeper)
    own, coarse = fusion.enter(stage), deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert fusion.attend is not None
    weights = fusion.attend(torch.cat([own, coarse], 1))
    torch.testing.assert_close(handed, weights[:, :1] * own + weights[:, 1:] * coarse)
    torch.testing.assert_close(compared, fusion.leave(handed))
    assert compared.shape == (2, 5, 4, 4)


def outputs() -> tuple[ModelOutput, ModelOutput]:
    student = {f"feature_maps[{-i}]": randn(4, 2 * i, 2 * i, 2 * i, seed=i).float().requires_grad_() for i in (1, 2, 3)}
    teacher = {f"feature_maps[{-i}]": randn(4, 5 * i, i, i, seed=10 + i).float() for i in (1, 2, 3)}
    return ModelOutput(torch.zeros(4, 2), student), ModelOutput(torch.zeros(4, 2), teacher)


def test_the_term_goes_from_the_deepest_stage_to_the_shallowest() -> None:
    torch.manual_seed(0)
    student, teacher = outputs()
    term = ReviewKDLoss(width=4)
    with pytest.raises(ValueError, match="ReviewKDLoss: nothing is built yet"):
        term(student, teacher, {})
    term.plan(lambda kind: 3, lambda kind: 4)
    assert term.needs_student == term.needs_teacher == ("feature_maps[-1]", "feature_maps[-2]", "feature_maps[-3]")
    term.connect(student, teacher, 10)
    value = term.eval()(student, teacher, {})
    handed, expected = None, torch.zeros(())
    for name, fusion in zip(term.needs_student, term.fusions, strict=True):
        compared, handed = fusion(student.features[name], handed)
        expected = expected + review_kd(compared, teacher.features[name])
    torch.testing.assert_close(value, expected)
    term.train()(student, teacher, {}).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_a_shallow_teacher_stage_teaches_the_students_deep_stage() -> None:
    student, teacher = outputs()
    torch.manual_seed(0)
    term = ReviewKDLoss(width=4)
    term.plan(lambda kind: 3, lambda kind: 3)
    term.connect(student, teacher, 10)
    compared, handed = None, None
    for name, fusion in zip(term.needs_student, term.fusions, strict=True):
        compared, handed = fusion(student.features[name], handed)
    assert compared is not None
    review_kd(compared, teacher.features["feature_maps[-3]"]).backward()
    deepest = student.features["feature_maps[-1]"].grad
    assert deepest is not None
    assert deepest.abs().sum() > 0
