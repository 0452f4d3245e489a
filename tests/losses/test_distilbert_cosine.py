from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning.losses.distilbert_cosine import DistilBERTCosineLoss, distilbert_cosine
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.sequences import MASK, assert_padding_changes_nothing, depths, said

STUDENT, TEACHER = randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)
CASES = [Case("distilbert_cosine", distilbert_cosine, (STUDENT, TEACHER), {}, mask=MASK)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    s, t = STUDENT.numpy(), TEACHER.numpy()
    values = 1 - (s * t).sum(2) / (np.linalg.norm(s, axis=2) * np.linalg.norm(t, axis=2))
    np.testing.assert_allclose(distilbert_cosine(STUDENT, TEACHER, reduction="none").numpy(), values, rtol=1e-9)
    assert distilbert_cosine(STUDENT, TEACHER, MASK).item() == pytest.approx(values[MASK.numpy()].mean())


def test_it_is_torchs_cosine_embedding_loss_with_target_one() -> None:
    flat = STUDENT[MASK], TEACHER[MASK]
    expected = F.cosine_embedding_loss(*flat, torch.ones(len(flat[0])))
    torch.testing.assert_close(distilbert_cosine(STUDENT, TEACHER, MASK), expected)


def test_lengths_do_not_matter_and_opposites_are_2_apart() -> None:
    torch.testing.assert_close(distilbert_cosine(3.0 * STUDENT, TEACHER), distilbert_cosine(STUDENT, TEACHER))
    assert distilbert_cosine(-TEACHER, TEACHER).item() == pytest.approx(2.0)
    assert distilbert_cosine(torch.zeros(1, 2, 3), torch.ones(1, 2, 3)).item() == 1.0


def test_a_state_of_length_zero_gets_no_gradient() -> None:
    student = STUDENT.float().clone()
    student[0] = 0.0
    student.requires_grad_()
    value = distilbert_cosine(student, TEACHER.float())
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert (student.grad[0] == 0).all()
    assert 0 < student.grad.abs().max() < 10


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"student hidden states \(2, 3, 4\) and teacher hidden states \(2, 3, 5\)"):
        distilbert_cosine(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"mask \(2, 4\) must have the shape \(2, 3\)"):
        distilbert_cosine(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))


def test_the_term_reads_the_last_layers() -> None:
    term = DistilBERTCosineLoss()
    term.plan(depths(3), depths(6))
    assert (term.needs_student, term.needs_teacher) == (("hidden[3]",), ("hidden[6]",))
    student, teacher = {"hidden[3]": STUDENT.clone()}, {"hidden[6]": TEACHER}
    term.connect(said(student), said(teacher), 10)
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, distilbert_cosine(STUDENT, TEACHER, MASK))
    torch.testing.assert_close(term(said(student), said(teacher), {}), distilbert_cosine(STUDENT, TEACHER))
    assert_padding_changes_nothing(term, student, teacher)


def test_a_projector_for_widths_that_differ() -> None:
    student, teacher = said({"hidden[1]": STUDENT.float()}), said({"hidden[1]": torch.randn(4, 3, 7)})
    term = DistilBERTCosineLoss(projector="linear")
    term.plan(depths(1), depths(1))
    term.connect(student, teacher, 10)
    (linear,) = [m for m in term.modules() if isinstance(m, nn.Linear)]
    torch.testing.assert_close(
        term(student, teacher, {}), distilbert_cosine(linear(STUDENT.float()), teacher.features["hidden[1]"])
    )
    plain = DistilBERTCosineLoss()
    plain.plan(depths(1), depths(1))
    with pytest.raises(ValueError, match="the student's width is 5 and the teacher's 7, and projector=none"):
        plain.connect(student, teacher, 10)
