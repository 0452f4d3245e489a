from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.layers import transport
from kd_lightning.losses.tinybert_hidden import TinyBERTHiddenLoss, tinybert_hidden
from tests.losses.conformance import Case, Conformance, randn, title
from tests.losses.sequences import MASK, assert_padding_changes_nothing, depths, said

STUDENT, TEACHER = randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)
CASES = [Case("tinybert_hidden", tinybert_hidden, (STUDENT, TEACHER), {}, mask=MASK)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    s, t = STUDENT.numpy(), TEACHER.numpy()
    squares = [[((s[b, i] - t[b, i]) ** 2).mean() for i in range(3)] for b in range(4)]
    np.testing.assert_allclose(tinybert_hidden(STUDENT, TEACHER, reduction="none").numpy(), squares, rtol=1e-12)
    counted = [squares[b][i] for b in range(4) for i in range(3) if MASK[b, i]]
    assert tinybert_hidden(STUDENT, TEACHER, MASK).item() == pytest.approx(np.mean(counted))
    assert tinybert_hidden(STUDENT, TEACHER, MASK, "sum").item() == pytest.approx(np.sum(counted))


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"student hidden states \(2, 3, 4\) and teacher hidden states \(2, 3, 5\)"):
        tinybert_hidden(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"mask \(2, 4\) must have the shape \(2, 3\)"):
        tinybert_hidden(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))


def features(layers: tuple[int, ...], width: int, seed: int) -> dict[str, torch.Tensor]:
    return {f"hidden[{i}]": randn(4, 3, width, seed=seed + i).float() for i in layers}


def test_the_term_projects_each_layer_and_averages() -> None:
    torch.manual_seed(0)
    term = TinyBERTHiddenLoss()
    term.plan(depths(2), depths(6))
    assert term.needs_teacher == ("hidden[3]", "hidden[6]")
    student, teacher = features((1, 2), 4, 0), features((3, 6), 5, 50)
    term.connect(said(student), said(teacher), 10)
    expected = [
        tinybert_hidden(term.projectors[str(i)](student[f"hidden[{i + 1}]"]), teacher[f"hidden[{3 * i + 3}]"], MASK)
        for i in range(2)
    ]
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, torch.stack(expected).mean())
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert_padding_changes_nothing(term, student, teacher)


def test_emd() -> None:
    term = TinyBERTHiddenLoss("emd", projector="none")
    term.plan(depths(2), depths(3))
    student, teacher = features((1, 2), 5, 0), features((1, 2, 3), 5, 50)
    term.connect(said(student), said(teacher), 10)
    costs = torch.stack([tinybert_hidden(s, t, MASK) for s in student.values() for t in teacher.values()]).view(2, 3)
    value = term(said(student), said(teacher), {"attention_mask": MASK.long()})
    torch.testing.assert_close(value, (transport(costs) * costs).sum())
    assert value < costs.mean()
    assert_padding_changes_nothing(term, student, teacher)


def test_images_have_no_mask() -> None:
    term = TinyBERTHiddenLoss()
    term.plan(depths(1), depths(1))
    student, teacher = features((1,), 4, 0), features((1,), 5, 50)
    term.connect(said(student), said(teacher), 10)
    expected = tinybert_hidden(term.projectors["0"](student["hidden[1]"]), teacher["hidden[1]"])
    torch.testing.assert_close(term(said(student), said(teacher), {"pixel_values": torch.zeros(4)}), expected)
