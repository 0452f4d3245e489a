from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import nn

from kd_lightning.losses.mobilebert import (
    MobileBERTAttentionLoss,
    MobileBERTFeatureMapLoss,
    mobilebert_attention,
    mobilebert_feature_map,
)
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.sequences import (
    MASK,
    assert_padding_changes_nothing,
    attention,
    by_query,
    depths,
    said,
    without_padding_keys,
)

STUDENT, TEACHER = randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)
ATTENTION_S, ATTENTION_T = attention(4, 2, 3, 1), attention(4, 2, 3, 2)
CASES = [
    Case("feature map", mobilebert_feature_map, (STUDENT, TEACHER), {}, mask=MASK),
    Case("decomposed", mobilebert_feature_map, (STUDENT, TEACHER), {"decomposed": True}, mask=MASK),
    Case(
        "attention", by_query(mobilebert_attention), (ATTENTION_S.transpose(1, 2), ATTENTION_T.transpose(1, 2)), {},
        mask=MASK, values="attention",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_feature_map_by_numpy() -> None:
    squares = ((STUDENT.numpy() - TEACHER.numpy()) ** 2).mean(2)
    np.testing.assert_allclose(mobilebert_feature_map(STUDENT, TEACHER, reduction="none"), squares, rtol=1e-12)
    assert mobilebert_feature_map(STUDENT, TEACHER, mask=MASK).item() == pytest.approx(squares[MASK.numpy()].mean())


def test_decomposed_by_numpy() -> None:
    expected = np.zeros((4, 3))
    for b in range(4):
        for i in range(3):
            s, t = STUDENT[b, i].numpy(), TEACHER[b, i].numpy()
            shape = ((s - s.mean()) / s.std() - (t - t.mean()) / t.std()) ** 2
            expected[b, i] = shape.mean() + (s.mean() - t.mean()) ** 2 + (s.std() - t.std()) ** 2
    values = mobilebert_feature_map(STUDENT, TEACHER, decomposed=True, reduction="none")
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-3)  # but for what is added to variances


def test_the_decomposition_is_exact_up_to_the_scale_of_the_normalised_part() -> None:
    # |s - t|^2 / D = (mu_s - mu_t)^2 + (sigma_s - sigma_t)^2 + sigma_s sigma_t |n_s - n_t|^2 / D
    plain = mobilebert_feature_map(STUDENT, TEACHER, reduction="none")
    whole = mobilebert_feature_map(STUDENT, TEACHER, decomposed=True, reduction="none")
    sigmas = [x.std(-1, correction=0) for x in (STUDENT, TEACHER)]
    statistics = (STUDENT.mean(-1) - TEACHER.mean(-1)) ** 2 + (sigmas[0] - sigmas[1]) ** 2
    torch.testing.assert_close(sigmas[0] * sigmas[1] * (whole - statistics) + statistics, plain, rtol=1e-3, atol=1e-4)


def test_decomposed_sees_the_scale_in_the_statistics_alone() -> None:
    centred = TEACHER - TEACHER.mean(-1, keepdim=True)
    sigma = centred.std(-1, correction=0)
    value = mobilebert_feature_map(3.0 * centred, centred, decomposed=True, reduction="none")
    torch.testing.assert_close(value, (2.0 * sigma) ** 2, rtol=1e-3, atol=1e-4)
    constant = torch.ones(1, 2, 3, requires_grad=True)
    mobilebert_feature_map(constant, torch.zeros(1, 2, 3), decomposed=True).backward()
    assert constant.grad is not None
    assert torch.isfinite(constant.grad).all()


def test_attention_by_scipy() -> None:
    student, teacher = (without_padding_keys(x, MASK) for x in (ATTENTION_S, ATTENTION_T))
    rows = [
        np.mean([rel_entr(teacher[b, h, q].numpy(), student[b, h, q].numpy()).sum() for h in range(2)])
        for b in range(4)
        for q in range(3)
        if MASK[b, q]
    ]
    assert mobilebert_attention(student, teacher, MASK).item() == pytest.approx(np.mean(rows))
    assert mobilebert_attention(student, teacher, MASK, "sum").item() == pytest.approx(np.sum(rows))
    assert mobilebert_attention(student, teacher, MASK).item() != pytest.approx(
        mobilebert_attention(teacher, student, MASK).item(), rel=1e-3
    )


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"student hidden states \(2, 3, 4\) and teacher hidden states \(2, 3, 5\)"):
        mobilebert_feature_map(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"the student has 2 attention heads and the teacher 3, .* head by head"):
        mobilebert_attention(ATTENTION_S, attention(4, 3, 3))
    with pytest.raises(ValueError, match=r"mask \(4, 2\) must have the shape \(4, 3\)"):
        mobilebert_attention(ATTENTION_S, ATTENTION_T, MASK[:, :2])
    with pytest.raises(ValueError, match=r"mask \(4, 2\) must have the shape \(4, 3\)"):
        mobilebert_feature_map(STUDENT, TEACHER, mask=MASK[:, :2])


@pytest.mark.parametrize("decomposed", [False, True])
def test_the_feature_map_term(decomposed: bool) -> None:
    torch.manual_seed(0)
    term = MobileBERTFeatureMapLoss(projector="linear", decomposed=decomposed)
    term.plan(depths(2), depths(4))
    assert (term.needs_student, term.needs_teacher) == (("hidden[1]", "hidden[2]"), ("hidden[2]", "hidden[4]"))
    student = {f"hidden[{i}]": randn(4, 3, 5, seed=i).float() for i in (1, 2)}
    teacher = {f"hidden[{i}]": randn(4, 3, 6, seed=9 + i).float() for i in (2, 4)}
    term.connect(said(student), said(teacher), 10)
    linears = [m for m in term.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2
    expected = [
        mobilebert_feature_map(linear(s), t, decomposed, MASK)
        for linear, s, t in zip(linears, student.values(), teacher.values(), strict=True)
    ]
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, torch.stack(expected).mean())
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert_padding_changes_nothing(term, student, teacher)


@pytest.mark.parametrize("batch", [{}, {"attention_mask": MASK.long()}], ids=["images", "text"])
def test_the_attention_term(batch: dict[str, Any]) -> None:
    term = MobileBERTAttentionLoss()
    term.plan(depths(2), depths(4))
    assert term.needs_teacher == ("attention[1]", "attention[3]")
    student = {f"attention[{i}]": without_padding_keys(attention(4, 2, 3, i), MASK) for i in (0, 1)}
    teacher = {f"attention[{i}]": without_padding_keys(attention(4, 2, 3, 9 + i), MASK) for i in (1, 3)}
    mask = MASK if batch else None
    expected = [
        mobilebert_attention(student[f"attention[{i}]"], teacher[f"attention[{2 * i + 1}]"], mask) for i in (0, 1)
    ]
    torch.testing.assert_close(term(said(student), said(teacher), batch), torch.stack(expected).mean())
    assert_padding_changes_nothing(term, student, teacher)
