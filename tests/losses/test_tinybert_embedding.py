from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning.losses.tinybert_embedding import TinyBERTEmbeddingLoss, tinybert_embedding
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.sequences import MASK, assert_padding_changes_nothing, said

STUDENT, TEACHER = randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)
CASES = [Case("tinybert_embedding", tinybert_embedding, (STUDENT, TEACHER), {}, mask=MASK)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    squares = (STUDENT.numpy() - TEACHER.numpy()) ** 2
    counted = [squares[b, i, d] for b in range(4) for i in range(3) if MASK[b, i] for d in range(5)]
    assert tinybert_embedding(STUDENT, TEACHER, MASK).item() == pytest.approx(np.mean(counted))
    np.testing.assert_allclose(tinybert_embedding(STUDENT, TEACHER, reduction="none"), squares.mean(2), rtol=1e-12)


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"student embeddings \(2, 3, 4\) and teacher embeddings \(2, 3, 5\)"):
        tinybert_embedding(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


def test_the_term_projects_the_embeddings() -> None:
    torch.manual_seed(0)
    term = TinyBERTEmbeddingLoss()
    assert term.needs_student == term.needs_teacher == ("embeddings",)
    student, teacher = {"embeddings": randn(4, 3, 4).float()}, {"embeddings": randn(4, 3, 5, seed=1).float()}
    term.connect(said(student), said(teacher), 10)
    assert isinstance(term.projector, nn.Linear)
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(
        value, tinybert_embedding(term.projector(student["embeddings"]), teacher["embeddings"], MASK)
    )
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert_padding_changes_nothing(term, student, teacher)


def test_widths_that_differ_without_a_projector() -> None:
    pair = said({"embeddings": torch.zeros(4, 3, 4)}), said({"embeddings": torch.zeros(4, 3, 5)})
    with pytest.raises(ValueError, match="embeddings: the student's width is 4 and the teacher's 5"):
        TinyBERTEmbeddingLoss("none").connect(*pair, 10)
