from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor

from kd_lightning.losses.minilm import MiniLMLoss, minilm
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.sequences import (
    MASK,
    assert_padding_changes_nothing,
    attention,
    by_query,
    said,
    without_padding_keys,
)

STUDENT, TEACHER = attention(4, 2, 3, 1), attention(4, 2, 3, 2)
VALUES_S, VALUES_T = randn(4, 3, 4, seed=3), randn(4, 3, 6, seed=4)


def by_values(student: Tensor, teacher: Tensor, attentions_s: Tensor, attentions_t: Tensor, **options: Any) -> Tensor:
    return minilm(attentions_s, attentions_t, student, teacher, **options)


CASES = [
    Case(
        "attentions", by_query(minilm), (STUDENT.transpose(1, 2), TEACHER.transpose(1, 2), VALUES_T, VALUES_T), {},
        mask=MASK, values="attention",
    ),
    Case("values", by_values, (VALUES_S, VALUES_T, STUDENT, STUDENT), {}, mask=MASK),
    Case("values of one width", by_values, (randn(4, 3, 6, seed=5), VALUES_T, STUDENT, STUDENT), {}, mask=MASK),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def relations(values: Tensor, example: int, heads: int, length: int) -> list[np.ndarray]:
    """softmax(V V^T / sqrt(d)) of each head of one example, of its first positions."""
    parts = np.split(values[example, :length].numpy(), heads, axis=1)
    return [softmax(v @ v.T / np.sqrt(v.shape[1]), axis=1) for v in parts]


def test_value_by_scipy_on_each_example_without_its_padding() -> None:
    student, teacher = (without_padding_keys(x, MASK) for x in (STUDENT, TEACHER))
    rows = []
    for b, length in enumerate(MASK.sum(1).tolist()):
        of_student, of_teacher = (relations(v, b, 2, length) for v in (VALUES_S, VALUES_T))
        for q in range(length):
            attentions = [rel_entr(*(x[b, h, q, :length].numpy() for x in (teacher, student))).sum() for h in range(2)]
            values = [rel_entr(of_teacher[h][q], of_student[h][q]).sum() for h in range(2)]
            rows.append(float(np.mean(attentions) + np.mean(values)))
    pair = student, teacher, VALUES_S, VALUES_T
    assert minilm(*pair, mask=MASK).item() == pytest.approx(np.mean(rows))
    assert minilm(*pair, mask=MASK, reduction="sum").item() == pytest.approx(np.sum(rows))
    each = minilm(*pair, mask=MASK, reduction="none")
    np.testing.assert_allclose(each[MASK].numpy(), rows, rtol=1e-9)
    assert (each[~MASK] == 0).all()


def test_rotating_or_reordering_values_within_a_head_changes_nothing() -> None:
    value = minilm(STUDENT, TEACHER, VALUES_S, VALUES_T)
    rotation = torch.block_diag(*(torch.linalg.qr(randn(2, 2, seed=seed))[0] for seed in (1, 2)))
    torch.testing.assert_close(minilm(STUDENT, TEACHER, VALUES_S @ rotation, VALUES_T), value)
    across = torch.linalg.qr(randn(4, 4, seed=3))[0]
    assert minilm(STUDENT, TEACHER, VALUES_S @ across, VALUES_T).item() != pytest.approx(value.item(), rel=1e-3)


def test_no_probability_is_no_nan() -> None:
    eye, half = torch.eye(2).view(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    values = torch.ones(1, 2, 1)
    student = half.clone().requires_grad_()
    value = minilm(student, eye, values, values)  # 0 log 0 = 0
    assert value.item() == pytest.approx(np.log(2))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    nothing = eye.clone().requires_grad_()
    value = minilm(nothing, 1 - eye, values, values)  # infinite, but for the clamp
    assert value.item() == pytest.approx(12 * np.log(10), rel=1e-5)
    value.backward()
    assert nothing.grad is not None
    assert torch.isfinite(nothing.grad).all()


def test_what_stands_at_padding_keys_does_not_matter() -> None:
    value = minilm(STUDENT, TEACHER, VALUES_S, VALUES_T, mask=MASK)
    noisy = STUDENT.masked_fill(~MASK[:, None, None, :], 5.0)
    torch.testing.assert_close(minilm(noisy, TEACHER, VALUES_S, VALUES_T, mask=MASK), value)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the student has 2 attention heads and the teacher 3, .* head by head"):
        minilm(STUDENT, attention(4, 3, 3), VALUES_S, VALUES_T)
    with pytest.raises(ValueError, match=r"2 heads do not divide the student's width 5"):
        minilm(STUDENT, TEACHER, randn(4, 3, 5), VALUES_T)
    with pytest.raises(ValueError, match=r"2 heads do not divide the teacher's width 5"):
        minilm(STUDENT, TEACHER, VALUES_S, randn(4, 3, 5))
    with pytest.raises(ValueError, match=r"student states \(4, 3, 4\) and teacher states \(4, 2, 6\) must agree"):
        minilm(STUDENT, TEACHER, VALUES_S, VALUES_T[:, :2])
    with pytest.raises(ValueError, match=r"mask \(4, 2\) must have the shape \(4, 3\)"):
        minilm(STUDENT, TEACHER, VALUES_S, VALUES_T, mask=MASK[:, :2])
    with pytest.raises(ValueError, match=r"student attentions \(4, 2, 3, 3\) and teacher attentions \(4, 2, 5, 5\)"):
        minilm(STUDENT, attention(4, 2, 5), VALUES_S, VALUES_T)


def test_the_term_reads_the_last_layers_values() -> None:
    term = MiniLMLoss()
    assert term.needs_student == term.needs_teacher == ("attention[-1]", "qkv[-1]")
    student = {"attention[-1]": without_padding_keys(STUDENT, MASK), "qkv[-1]": randn(4, 3, 3, 4, seed=5)}
    teacher = {"attention[-1]": without_padding_keys(TEACHER, MASK), "qkv[-1]": randn(4, 3, 3, 6, seed=6)}
    pair = student["attention[-1]"], teacher["attention[-1]"]
    values = student["qkv[-1]"][:, :, 2], teacher["qkv[-1]"][:, :, 2]
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, minilm(*pair, *values, mask=MASK))
    torch.testing.assert_close(term(said(student), said(teacher), {}), minilm(*pair, *values))
    assert_padding_changes_nothing(term, student, teacher)


def test_networks_that_read_different_tokens() -> None:
    student = said({"attention[-1]": attention(4, 2, 3), "qkv[-1]": randn(4, 3, 3, 4)})
    teacher = said({"attention[-1]": attention(4, 2, 5), "qkv[-1]": randn(4, 5, 3, 4)})
    with pytest.raises(ValueError, match="the student's feature has 3 positions and the teacher's 5"):
        MiniLMLoss()(student, teacher, {"attention_mask": MASK.long()})
