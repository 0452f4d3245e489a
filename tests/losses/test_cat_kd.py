from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.cat_kd import CATKDLoss, cat_kd
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2)
CASES = [
    Case("cat_kd", cat_kd, MAPS, {}),
    Case("another size", cat_kd, (MAPS[0], randn(4, 3, 6, 6, seed=3)), {"size": 3}),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    expected = np.zeros((4, 3))
    for b in range(4):
        for c in range(3):
            pooled = [x.numpy()[b, c].reshape(2, 2, 2, 2).mean((1, 3)).ravel() for x in MAPS]
            s, t = (x / np.linalg.norm(x) for x in pooled)
            expected[b, c] = ((s - t) ** 2).sum()
    np.testing.assert_allclose(cat_kd(*MAPS, reduction="none"), expected.mean(1), rtol=1e-12)


def test_how_strong_a_class_is_does_not_matter() -> None:
    scale = torch.rand(4, 3, 1, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(cat_kd(scale * MAPS[0], MAPS[1]), cat_kd(*MAPS))
    assert cat_kd(scale * MAPS[0], MAPS[0]).item() == pytest.approx(0.0, abs=1e-12)
    assert cat_kd(-MAPS[0], MAPS[0]).item() == pytest.approx(4.0)


def test_a_class_that_is_nowhere_gets_a_finite_gradient() -> None:
    student = torch.zeros(1, 1, 2, 2, requires_grad=True)
    value = cat_kd(student, torch.ones(1, 1, 2, 2))
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student maps \(2, 3\) and teacher maps \(2, 3, 4, 4\)"):
        cat_kd(torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"student pooled class maps \(2, 3, 4\) and teacher pooled class maps \(2, 5, 4\)"
    ):
        cat_kd(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        cat_kd(*MAPS, size=1)


def test_the_term_reads_the_features_it_names() -> None:
    student, teacher = (
        ModelOutput(torch.zeros(4, 3), {name: x}) for name, x in zip(("cam", "head"), MAPS, strict=True)
    )
    term = CATKDLoss(teacher_feature="head")
    assert (term.needs_student, term.needs_teacher) == (("cam",), ("head",))
    torch.testing.assert_close(term(student, teacher, {}), cat_kd(*MAPS))
