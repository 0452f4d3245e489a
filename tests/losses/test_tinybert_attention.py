from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.layers import transport
from kd_lightning.losses.tinybert_attention import TinyBERTAttentionLoss, tinybert_attention
from tests.losses.conformance import Case, Conformance, title
from tests.losses.sequences import (
    MASK,
    assert_padding_changes_nothing,
    attention,
    by_query,
    depths,
    said,
    without_padding_keys,
)

STUDENT, TEACHER, MORE_HEADS = attention(4, 2, 3, 1), attention(4, 2, 3, 2), attention(4, 3, 3, 3)
QUERIES_S, QUERIES_T, QUERIES_M = (x.transpose(1, 2) for x in (STUDENT, TEACHER, MORE_HEADS))
CASES = [
    Case("tinybert_attention", by_query(tinybert_attention), (QUERIES_S, QUERIES_T), {}, mask=MASK, values="attention"),
    Case(
        "averaged",
        by_query(tinybert_attention),
        (QUERIES_S, QUERIES_M),
        {"average_heads": True},
        mask=MASK,
        values="attention",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    s, t, counts = STUDENT.numpy(), TEACHER.numpy(), MASK.numpy()
    rows = [
        np.mean([(s[b, h, q, k] - t[b, h, q, k]) ** 2 for h in range(2) for k in range(3) if counts[b, k]])
        for b in range(4)
        for q in range(3)
        if counts[b, q]
    ]
    assert tinybert_attention(STUDENT, TEACHER, mask=MASK).item() == pytest.approx(np.mean(rows))
    assert tinybert_attention(STUDENT, TEACHER, mask=MASK, reduction="sum").item() == pytest.approx(np.sum(rows))
    assert tinybert_attention(STUDENT, TEACHER).item() == pytest.approx(((s - t) ** 2).mean())
    assert tinybert_attention(STUDENT, TEACHER, reduction="none").shape == (4, 3)


def test_the_mean_of_heads_is_no_different_for_their_order_or_their_number() -> None:
    value = tinybert_attention(STUDENT, MORE_HEADS, average_heads=True)
    torch.testing.assert_close(tinybert_attention(STUDENT.flip(1), MORE_HEADS, average_heads=True), value)
    torch.testing.assert_close(tinybert_attention(STUDENT.repeat(1, 2, 1, 1), MORE_HEADS, average_heads=True), value)
    expected = ((STUDENT.numpy().mean(1) - MORE_HEADS.numpy().mean(1)) ** 2).mean()
    assert value.item() == pytest.approx(expected)


def test_what_stands_at_padding_keys_does_not_matter() -> None:
    value = tinybert_attention(STUDENT, TEACHER, mask=MASK)
    noisy = STUDENT.masked_fill(~MASK[:, None, None, :], 5.0)
    torch.testing.assert_close(tinybert_attention(noisy, TEACHER, mask=MASK), value)


def test_what_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"student has 2 attention heads and the teacher 3.*give the student 3.*average_heads=true"
    ):
        tinybert_attention(STUDENT, MORE_HEADS)
    with pytest.raises(ValueError, match=r"student attentions \(4, 2, 3, 3\) and teacher attentions \(4, 2, 5, 5\)"):
        tinybert_attention(STUDENT, attention(4, 2, 5))
    with pytest.raises(ValueError, match=r"\(4, 3, 3\) and teacher attentions .* must be \(B, H, L, L\)"):
        tinybert_attention(STUDENT[:, 0], TEACHER)
    with pytest.raises(ValueError, match=r"mask \(4, 2\) must have the shape \(4, 3\)"):
        tinybert_attention(STUDENT, TEACHER, mask=MASK[:, :2])


def test_the_term() -> None:
    term = TinyBERTAttentionLoss()
    term.plan(depths(2), depths(4))
    assert term.needs_student == ("attention[0]", "attention[1]")
    assert term.needs_teacher == ("attention[1]", "attention[3]")
    student = {f"attention[{i}]": without_padding_keys(attention(4, 2, 3, i), MASK) for i in (0, 1)}
    teacher = {f"attention[{i}]": without_padding_keys(attention(4, 2, 3, 9 + i), MASK) for i in (1, 3)}
    term.connect(said(student), said(teacher), 10)
    assert not list(term.parameters())
    expected = [
        tinybert_attention(student[f"attention[{i}]"], teacher[f"attention[{2 * i + 1}]"], mask=MASK) for i in (0, 1)
    ]
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, torch.stack(expected).mean())
    assert_padding_changes_nothing(term, student, teacher)


def test_emd_with_heads_that_differ() -> None:
    term = TinyBERTAttentionLoss("emd", average_heads=True)
    term.plan(depths(2), depths(3))
    student = {f"attention[{i}]": without_padding_keys(attention(4, 2, 3, i), MASK) for i in range(2)}
    teacher = {f"attention[{i}]": without_padding_keys(attention(4, 3, 3, 9 + i), MASK) for i in range(3)}
    costs = torch.stack([tinybert_attention(s, t, True, MASK) for s in student.values() for t in teacher.values()])
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, (transport(costs.view(2, 3)) * costs.view(2, 3)).sum())
    assert_padding_changes_nothing(term, student, teacher)


def test_images_have_no_mask() -> None:
    term = TinyBERTAttentionLoss()
    term.plan(depths(1), depths(1))
    value = term(said({"attention[0]": STUDENT}), said({"attention[0]": TEACHER}), {"pixel_values": torch.zeros(4)})
    torch.testing.assert_close(value, tinybert_attention(STUDENT, TEACHER))
