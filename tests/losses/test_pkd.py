from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.losses.pkd import PKDLoss, pkd
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.sequences import assert_padding_changes_nothing, depths, said

STUDENT, TEACHER = randn(6, 4, seed=1), randn(6, 4, seed=2)
CASES = [Case("pkd", pkd, (STUDENT, TEACHER), {}, mask=torch.arange(6) % 2 == 0)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    s, t = STUDENT.numpy(), TEACHER.numpy()
    cosines = [float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(s, t, strict=True)]
    expected = 2 - 2 * np.array(cosines)
    np.testing.assert_allclose(pkd(STUDENT, TEACHER, reduction="none").numpy(), expected, rtol=1e-12)
    assert pkd(STUDENT, TEACHER).item() == pytest.approx(expected.mean())
    assert pkd(STUDENT, TEACHER, reduction="sum").item() == pytest.approx(expected.sum())


def test_lengths_and_common_rotations_do_not_matter_and_opposites_are_4_apart() -> None:
    value = pkd(STUDENT, TEACHER)
    lengths = torch.arange(1.0, 7.0).unsqueeze(1)
    torch.testing.assert_close(pkd(lengths * STUDENT, 0.1 * lengths * TEACHER), value)
    rotation = torch.linalg.qr(randn(4, 4, seed=3))[0]
    torch.testing.assert_close(pkd(STUDENT @ rotation, TEACHER @ rotation), value)
    assert pkd(-TEACHER, TEACHER).item() == pytest.approx(4.0)
    assert torch.isfinite(pkd(torch.zeros(2, 4), torch.zeros(2, 4)))


def test_a_state_of_length_zero_gets_no_gradient() -> None:
    student = STUDENT.float().clone()
    student[0] = 0.0
    student.requires_grad_()
    value = pkd(student, TEACHER.float())
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert (student.grad[0] == 0).all()
    assert 0 < student.grad.abs().max() < 10


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"student states \(2, 3\) and teacher states \(2, 4\)"):
        pkd(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        pkd(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("layers", "student", "expected"),
    [  # the paper's figures: 6 and 3 layers of 12, counted from 1
        ("uniform", 6, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}),
        ("last", 6, {1: 7, 2: 8, 3: 9, 4: 10, 5: 11}),
        ("uniform", 3, {1: 4, 2: 8}),
        ("last", 3, {1: 10, 2: 11}),
        ([[2, 11]], 3, {3: 12}),
    ],
)
def test_skip_and_last(layers: Any, student: int, expected: dict[int, int]) -> None:
    term = PKDLoss(layers)
    term.plan(depths(student), depths(12))
    assert {s + 1: t + 1 for s, t in term.pairs} == expected
    assert term.needs_teacher == tuple(f"hidden[{t}]" for t in expected.values())


def test_emd_leaves_both_last_layers_out() -> None:
    term = PKDLoss("emd")
    term.plan(depths(3), depths(4))
    assert term.pairs == [(s, t) for s in range(2) for t in range(3)]
    features = {f"hidden[{i}]": randn(2, 3, 4, seed=i) for i in range(1, 4)}
    term.connect(said(features), said(features), 10)
    assert 0 < term(said(features), said(features), {}).item() < 2


def test_a_student_of_one_layer_has_none_to_give() -> None:
    with pytest.raises(
        ValueError, match="the student has 1 and the teacher 6, so that no pair is left; give the pairs"
    ):
        PKDLoss().plan(depths(1), depths(6))


def test_the_term_reads_the_first_position() -> None:
    term = PKDLoss()
    term.plan(depths(3), depths(6))
    student = {f"hidden[{i}]": randn(4, 3, 5, seed=i) for i in (1, 2)}
    teacher = {f"hidden[{i}]": randn(4, 3, 5, seed=i) for i in (2, 4)}
    term.connect(said(student), said(teacher), 10)
    expected = [pkd(student[f"hidden[{i}]"][:, 0], teacher[f"hidden[{2 * i}]"][:, 0]) for i in (1, 2)]
    torch.testing.assert_close(term(said(student), said(teacher), {}), torch.stack(expected).mean())
    assert_padding_changes_nothing(term, student, teacher)


def test_padding_on_the_left_is_refused() -> None:
    term = PKDLoss("last")
    term.plan(depths(2), depths(3))
    student, teacher = said({"hidden[1]": randn(2, 3, 5)}), said({"hidden[2]": randn(2, 3, 5, seed=1)})
    term.connect(student, teacher, 10)
    with pytest.raises(ValueError, match=r"attention_mask\[:, 0\] is 0: pad on the right"):
        term(student, teacher, {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])})
    assert term(student, teacher, {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}) > 0


def test_a_projector_for_widths_that_differ() -> None:
    term = PKDLoss(projector="linear")
    term.plan(depths(2), depths(4))
    student, teacher = said({"hidden[1]": torch.randn(4, 3, 5)}), said({"hidden[2]": torch.randn(4, 3, 7)})
    term.connect(student, teacher, 10)
    (weight,) = [m.weight for m in term.modules() if isinstance(m, nn.Linear)]
    assert weight.shape == (7, 5)
    term(student, teacher, {}).backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    plain = PKDLoss()
    plain.plan(depths(2), depths(4))
    with pytest.raises(ValueError, match="the student's width is 5 and the teacher's 7, and projector=none"):
        plain.connect(student, teacher, 10)
