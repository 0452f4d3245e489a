from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.relations import RelationTerm, counting_examples, off_diagonal, patterns, unit
from kd_lightning.types import ModelOutput
from tests.losses.conformance import randn


class Pair(RelationTerm):
    """Shows what `compare` is given."""

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        self.given = student, teacher
        return student.sum()


def given(student: torch.Tensor, teacher: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    term = Pair("hidden[-1]", "pooled")
    assert (term.needs_student, term.needs_teacher) == (("hidden[-1]",), ("pooled",))
    logits = torch.zeros(len(student), 2)
    term(ModelOutput(logits, {"hidden[-1]": student}), ModelOutput(logits, {"pooled": teacher}), batch)
    return term.given


def test_an_example_is_the_mean_of_its_tokens_and_a_whole_map() -> None:
    tokens, maps = randn(2, 3, 4), randn(2, 5, 2, 3)
    student, teacher = given(tokens, maps, {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    torch.testing.assert_close(student, torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)]))
    assert torch.equal(teacher, maps.reshape(2, 30))


def test_a_teacher_with_its_own_tokens_has_its_own_mask() -> None:
    student, teacher = randn(2, 3, 4), randn(2, 5, 6)
    batch = {"attention_mask": torch.ones(2, 3), "teacher_attention_mask": torch.tensor([[1, 1, 0, 0, 0]] * 2)}
    torch.testing.assert_close(given(student, teacher, batch)[1], teacher[:, :2].mean(1))


def test_vectors_are_taken_as_they_are() -> None:
    student, teacher = randn(3, 4), randn(3, 2)
    assert all(
        a is b or torch.equal(a, b) for a, b in zip(given(student, teacher, {}), (student, teacher), strict=True)
    )


def test_unit_vectors_and_the_gradient_of_zero() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-17, 0.0]], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64), rtol=1e-12, atol=0.0
    )
    unit(x)[1].sum().backward()
    assert x.grad is not None
    assert (x.grad[1] == 0).all()


def test_off_diagonal() -> None:
    x = torch.arange(9.0).view(3, 3)
    assert off_diagonal(x).tolist() == [[1, 2], [3, 5], [6, 7]]
    assert off_diagonal(torch.ones(1, 1)).shape == (1, 0)


def test_patterns_of_maps_and_tokens() -> None:
    maps, tokens = randn(2, 3, 2, 2), randn(2, 3, 4)
    np.testing.assert_array_equal(patterns(maps), maps.numpy().reshape(2, 3, 4))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    expected = tokens.numpy().transpose(0, 2, 1).copy()
    expected[0, :, 2] = 0.0
    np.testing.assert_array_equal(patterns(tokens, mask), expected)


def test_features_without_positions() -> None:
    with pytest.raises(ValueError, match=r"feature \(2, 3\): expected a map"):
        patterns(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"feature \(2, 3, 4, 4\): expected a map .* without a mask"):
        patterns(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask \(2, 4\) must have the shape \(2, 3\)"):
        patterns(torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))


def test_examples_that_count() -> None:
    assert counting_examples(None) is None
    counts = counting_examples(torch.tensor([[True, False], [False, False]]))
    assert counts is not None
    assert counts.tolist() == [True, False]
