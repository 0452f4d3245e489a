"""What holds for every loss of the relations between a batch's examples, beside the conformance of all losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.relations import RelationTerm
from kd_lightning.types import ModelOutput
from tests.losses.conformance import randn

Loss = Callable[[Tensor, Tensor], Tensor]
STUDENT, TEACHER = randn(6, 4, seed=1), randn(6, 5, seed=2)


def rotation(size: int) -> Tensor:
    """Return an orthogonal matrix."""
    return torch.linalg.qr(randn(size, size, seed=9)).Q


class Relations:
    """Inherit with `@pytest.mark.parametrize("loss", [...])`."""

    smallest = 2
    """How many examples make a relation."""

    def test_a_rotated_feature_space_is_the_same(self, loss: Loss) -> None:
        torch.testing.assert_close(loss(STUDENT @ rotation(4), TEACHER), loss(STUDENT, TEACHER))
        torch.testing.assert_close(loss(STUDENT, TEACHER @ rotation(5)), loss(STUDENT, TEACHER))
        assert loss(TEACHER @ rotation(5), TEACHER).item() == pytest.approx(0.0, abs=1e-12)

    def test_a_scaled_feature_space_is_the_same(self, loss: Loss) -> None:
        torch.testing.assert_close(loss(0.3 * STUDENT, 7 * TEACHER), loss(STUDENT, TEACHER))

    def test_a_skewed_feature_space_is_not(self, loss: Loss) -> None:
        skew = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.1], dtype=torch.float64))
        assert loss(TEACHER @ skew, TEACHER).item() > 1e-4

    def test_the_order_of_the_examples_does_not_matter(self, loss: Loss) -> None:
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        torch.testing.assert_close(loss(STUDENT[order], TEACHER[order]), loss(STUDENT, TEACHER))
        assert loss(STUDENT[order], TEACHER).item() != pytest.approx(loss(STUDENT, TEACHER).item(), rel=1e-3)

    def test_too_few_examples_give_a_zero_with_a_graph(self, loss: Loss) -> None:
        for size in range(1, self.smallest):
            student = STUDENT[:size].clone().requires_grad_()
            value = loss(student, TEACHER[:size])
            value.backward()
            assert value.item() == pytest.approx(0.0, abs=1e-15)
            assert student.grad is not None
            assert student.grad.abs().max().item() == pytest.approx(0.0, abs=1e-12)

    def test_equal_examples_and_zeros_send_a_modest_gradient(self, loss: Loss) -> None:
        for rows in ([0, 0, 1, 2], [0, 0, 0, 0]):
            for student, teacher in ((STUDENT[rows], TEACHER[:4]), (STUDENT[:4], TEACHER[rows])):
                for zero in (False, True):
                    given = student.clone()
                    if zero:
                        given[3] = 0.0
                    given.requires_grad_()
                    value = loss(given, teacher)
                    value.backward()
                    assert torch.isfinite(value)
                    assert given.grad is not None
                    assert given.grad.abs().max() < 10

    def test_a_student_that_says_zero_of_everything(self, loss: Loss) -> None:
        student = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        value = loss(student, TEACHER[:4])
        value.backward()
        assert torch.isfinite(value)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    def test_features_of_other_examples(self, loss: Loss) -> None:
        with pytest.raises(ValueError, match=r"student feature \(3, 4\) and teacher feature \(2, 4\)"):
            loss(torch.zeros(3, 4), torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"student feature \(3, 2, 4\) .* must be vectors"):
            loss(torch.zeros(3, 2, 4), torch.zeros(3, 4))


def check_term(term: RelationTerm, loss: Loss) -> None:
    """The term compares `pooled` by default, without a mask, and gives what the function gives."""
    assert (term.needs_student, term.needs_teacher) == (("pooled",), ("pooled",))
    student = ModelOutput(torch.zeros(6, 2), {"pooled": STUDENT})
    teacher = ModelOutput(torch.zeros(6, 2), {"pooled": TEACHER})
    assert torch.equal(term(student, teacher, {"attention_mask": torch.ones(6, 3)}), loss(STUDENT, TEACHER))
    assert not list(term.parameters())
