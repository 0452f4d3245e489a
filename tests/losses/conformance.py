"""What holds for every loss function; each loss's own tests add its values and the facts of its theory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

Function = Callable[..., Tensor]


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64, the same in every run."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A loss function and arguments for it.

    Attributes:
        name: What a failing test is called.
        function: Called with the tensors, then the options.
        tensors: The student's tensor first, then the teacher's (float64), then others if it takes any.
        options: Keyword arguments.
        mask: True where the student's axes 0.. count, of the shape the loss takes; None for a loss without masks.
        zero: It is zero where the student's tensor equals the teacher's.
        mean: It is a mean over examples, so that equal microbatches average to the whole.
        narrow: Also finite, and as float32 of the same numbers, for half-precision tensors.
        compiled: `torch.compile` takes it whole.
    """

    name: str
    function: Function
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]
    mask: Tensor | None = None
    zero: bool = True
    mean: bool = True
    narrow: bool = True
    compiled: bool = True

    def __call__(self, *tensors: Tensor, **more: Any) -> Tensor:
        return self.function(*tensors, **{**self.options, **more})


def title(case: Case) -> str:
    return case.name


class Conformance:
    """Inherit with `@pytest.mark.parametrize("case", CASES, ids=title)`."""

    def test_smoke(self, case: Case) -> None:
        value = case(*case.tensors)
        assert value.shape == ()
        assert torch.isfinite(value)
        assert value.dtype == torch.float64

    def test_only_the_student_gets_a_gradient(self, case: Case) -> None:
        tensors = [x.clone().requires_grad_() if x.is_floating_point() else x for x in case.tensors]
        case(*tensors).backward()
        assert tensors[0].grad is not None
        assert torch.isfinite(tensors[0].grad).all()
        assert tensors[0].grad.abs().sum() > 0
        assert tensors[1].grad is None

    def test_gradcheck(self, case: Case) -> None:
        student = case.tensors[0].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: case(x, *case.tensors[1:]), (student,))

    def test_a_step_against_the_gradient_lowers_it(self, case: Case) -> None:
        student = case.tensors[0].clone().requires_grad_()
        value = case(student, *case.tensors[1:])
        (gradient,) = torch.autograd.grad(value, student)
        step = 1e-4 / gradient.norm()
        assert case(student.detach() - step * gradient, *case.tensors[1:]) < value

    def test_zero_at_equality_and_not_negative(self, case: Case) -> None:
        if not case.zero:
            pytest.skip("not zero at equality")
        teacher = case.tensors[1]
        if teacher.shape != case.tensors[0].shape:
            pytest.skip("the tensors differ in shape")
        assert case(teacher.clone(), *case.tensors[1:]).item() == pytest.approx(0.0, abs=1e-9)
        assert case(*case.tensors).item() > 0

    def test_what_is_masked_does_not_matter(self, case: Case) -> None:
        if case.mask is None:
            pytest.skip("takes no mask")
        student, teacher, *others = case.tensors
        counts = case.mask.view(*case.mask.shape, *[1] * (student.ndim - case.mask.ndim)).expand_as(student)
        counts_t = case.mask.view(*case.mask.shape, *[1] * (teacher.ndim - case.mask.ndim)).expand_as(teacher)
        value = case(student, teacher, *others, mask=case.mask)
        noisy = torch.where(counts, student, 7.0).requires_grad_()
        again = case(noisy, torch.where(counts_t, teacher, -3.0), *others, mask=case.mask)
        torch.testing.assert_close(again, value)
        again.backward()
        assert noisy.grad is not None
        assert (noisy.grad[~counts] == 0).all()
        assert value.item() != pytest.approx(case(*case.tensors).item(), rel=1e-6)

    def test_where_nothing_counts_it_is_a_zero_with_a_graph(self, case: Case) -> None:
        if case.mask is None:
            pytest.skip("takes no mask")
        student = case.tensors[0].clone().requires_grad_()
        value = case(student, *case.tensors[1:], mask=torch.zeros_like(case.mask))
        value.backward()
        assert value.item() == 0.0
        assert student.grad is not None
        assert (student.grad == 0).all()

    def test_microbatches_average_to_the_whole(self, case: Case) -> None:
        if not case.mean:
            pytest.skip("no mean over examples")
        size = len(case.tensors[0])
        assert size % 2 == 0, "give an even number of examples"
        halves = [case(*(x[part] for x in case.tensors)) for part in (slice(size // 2), slice(size // 2, None))]
        torch.testing.assert_close(torch.stack(halves).mean(), case(*case.tensors))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, case: Case, dtype: torch.dtype) -> None:
        if not case.narrow:
            pytest.skip("takes float32 and wider")
        tensors = [x.to(dtype) if x.is_floating_point() else x for x in case.tensors]
        tensors[0].requires_grad_()
        value = case(*tensors)
        wide = case(*(x.float() if x.is_floating_point() else x for x in tensors))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wide)
        value.backward()
        assert tensors[0].grad is not None
        assert torch.isfinite(tensors[0].grad).all()

    def test_autocast_does_not_reach_it(self, case: Case) -> None:
        tensors = [x.float() if x.is_floating_point() else x for x in case.tensors]
        with torch.autocast("cpu", torch.bfloat16):
            value = case(*tensors)
        torch.testing.assert_close(value, case(*tensors), rtol=1e-6, atol=1e-7)

    @pytest.mark.slow
    def test_compiled_equals_eager(self, case: Case) -> None:
        if not case.compiled:
            pytest.skip("not compiled whole")
        torch._dynamo.reset()
        tensors = [x.float() if x.is_floating_point() else x for x in case.tensors]
        compiled = torch.compile(lambda *given: case(*given), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), case(*tensors), rtol=1e-5, atol=1e-6)
