from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kd_lightning.losses.minilmv2 import MiniLMv2Loss, minilmv2
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.sequences import MASK, assert_padding_changes_nothing, said

STUDENT, TEACHER = randn(4, 3, 3, 4, seed=1), randn(4, 3, 3, 6, seed=2)
CASES = [
    Case("minilmv2", minilmv2, (STUDENT, TEACHER), {"relation_heads": 2}, mask=MASK),
    Case("equal widths", minilmv2, (STUDENT, randn(4, 3, 3, 4, seed=3)), {"relation_heads": 4}, mask=MASK),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_scipy_on_each_example_without_its_padding() -> None:
    rows = []
    for b, length in enumerate(MASK.sum(1).tolist()):
        total = np.zeros(length)
        for x in range(3):
            for a in range(2):
                s, t = (
                    STUDENT[b, :length, x, 2 * a : 2 * a + 2].numpy(),
                    TEACHER[b, :length, x, 3 * a : 3 * a + 3].numpy(),
                )
                of_student, of_teacher = (softmax(v @ v.T / np.sqrt(v.shape[1]), axis=1) for v in (s, t))
                total += rel_entr(of_teacher, of_student).sum(1) / 2
        rows.extend(total)
    assert minilmv2(STUDENT, TEACHER, 2, MASK).item() == pytest.approx(np.mean(rows))
    assert minilmv2(STUDENT, TEACHER, 2, MASK, "sum").item() == pytest.approx(np.sum(rows))
    np.testing.assert_allclose(minilmv2(STUDENT, TEACHER, 2, MASK, "none")[MASK].numpy(), rows, rtol=1e-9)


def test_a_rotation_within_relation_heads_changes_nothing() -> None:
    value = minilmv2(STUDENT, TEACHER, 2)
    rotation = torch.block_diag(*(torch.linalg.qr(randn(2, 2, seed=seed))[0] for seed in (1, 2)))
    torch.testing.assert_close(minilmv2(STUDENT @ rotation, TEACHER, 2), value)
    assert minilmv2(STUDENT @ rotation, TEACHER, 1).item() == pytest.approx(minilmv2(STUDENT, TEACHER, 1).item())
    assert minilmv2(STUDENT, TEACHER, 1).item() != pytest.approx(value.item(), rel=1e-3)


def test_each_of_queries_keys_and_values_counts_and_none_is_compared_with_another() -> None:
    teacher = randn(4, 3, 3, 4, seed=3)
    alone = []
    for x in range(3):
        student = teacher.clone()
        student[:, :, x] = STUDENT[:, :, x]
        alone.append(minilmv2(student, teacher, 2))
    assert all(value.item() > 0 for value in alone)
    torch.testing.assert_close(torch.stack(alone).sum(), minilmv2(STUDENT, teacher, 2))


def test_large_scores_and_an_example_of_padding_alone_stay_finite() -> None:
    student = (100.0 * STUDENT).float().requires_grad_()
    empty = MASK.clone()
    empty[0] = False
    value = minilmv2(student, (100.0 * TEACHER).float(), 2, empty)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[0] == 0).all()


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide the student's width 4"):
        minilmv2(STUDENT, TEACHER, 3)
    with pytest.raises(ValueError, match="4 heads do not divide the teacher's width 6"):
        minilmv2(STUDENT, TEACHER, 4)
    with pytest.raises(ValueError, match="0 heads do not divide"):
        minilmv2(STUDENT, TEACHER, 0)
    with pytest.raises(ValueError, match=r"teacher queries, keys and values \(4, 3, 6\) must be \(B, L, 3, D\)"):
        minilmv2(STUDENT, TEACHER[:, :, 0], 2)
    with pytest.raises(ValueError, match=r"student queries, keys and values \(4, 3, 2, 4\) must be"):
        minilmv2(STUDENT[:, :, :2], TEACHER, 2)
    with pytest.raises(ValueError, match=r"student states \(4, 3, 4\) and teacher states \(4, 2, 6\) must agree"):
        minilmv2(STUDENT, TEACHER[:, :2], 2)
    with pytest.raises(ValueError, match=r"mask \(4, 2\) must have the shape \(4, 3\)"):
        minilmv2(STUDENT, TEACHER, 2, MASK[:, :2])


@pytest.mark.parametrize("layer", [-1, 20, -4])
def test_the_term_reads_a_chosen_layer_of_the_teacher(layer: int) -> None:
    term = MiniLMv2Loss(relation_heads=2, teacher_layer=layer)
    assert (term.needs_student, term.needs_teacher) == (("qkv[-1]",), (f"qkv[{layer}]",))
    student, teacher = {"qkv[-1]": STUDENT.clone()}, {f"qkv[{layer}]": TEACHER}
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, minilmv2(STUDENT, TEACHER, 2, MASK))
    torch.testing.assert_close(term(said(student), said(teacher), {}), minilmv2(STUDENT, TEACHER, 2))
    assert_padding_changes_nothing(term, student, teacher)
