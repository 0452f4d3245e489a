"""What holds for every loss function; each loss's own tests add its values and the facts of its theory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.losses.hostile import PATTERNS, Values, hostile

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
        values: What its first two tensors may hold.
        near: In float32 it is near float64's everywhere: its gradient has no jumps, where rounding decides.
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
    values: Values = "free"
    near: bool = True

    def __call__(self, *tensors: Tensor, **more: Any) -> Tensor:
        return self.function(*tensors, **{**self.options, **more})

    def reads(self, side: int) -> Tensor:
        """Return which entries of the student's (0) or the teacher's (1) tensor it reads."""
        return torch.ones_like(self.tensors[side], dtype=torch.bool)

    def counts(self, side: int) -> Tensor:
        """Return the mask, as large as the student's (0) or the teacher's (1) tensor."""
        assert self.mask is not None
        tensor = self.tensors[side]
        return self.mask.view(*self.mask.shape, *[1] * (tensor.ndim - self.mask.ndim)).expand_as(tensor)

    def with_gradient(self, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the value and the student's gradient, computed in this precision, for so many of the examples."""
        student = student.to(dtype).requires_grad_()
        others = [x[: len(student)] for x in self.tensors[2:]]
        options = {name: _as(x, dtype) for name, x in self.options.items()}
        value = self.function(student, teacher.to(dtype), *(_as(x, dtype) for x in others), **options)
        (gradient,) = torch.autograd.grad(value, student)
        return value.detach(), gradient


def _as(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def title(case: Case) -> str:
    return case.name


SIZED = {"variance", "margin", "generate", "relation_heads"}
"""Options that are made for one width."""


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
        counts, counts_t = case.counts(0), case.counts(1)
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

    @pytest.mark.parametrize("filler", [torch.nan, torch.inf])
    def test_what_is_masked_may_be_no_number(self, case: Case, filler: float) -> None:
        if case.mask is None:
            pytest.skip("takes no mask")
        value, *given = case(*case.tensors, mask=case.mask), *case.tensors
        for side in (0, 1):
            given[side] = torch.where(case.counts(side), given[side], filler)
        given[0].requires_grad_()
        again = case(*given, mask=case.mask)
        torch.testing.assert_close(again, value)
        (gradient,) = torch.autograd.grad(again, given[0])
        assert torch.isfinite(gradient).all()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(
        student=st.sampled_from(sorted(PATTERNS)), teacher=st.sampled_from(sorted(PATTERNS)),
        seed=st.integers(0, 999), one=st.booleans(),
    )  # fmt: skip
    def test_a_finite_value_in_float32_has_a_finite_gradient_near_float64s(
        self, case: Case, student: str, teacher: str, seed: int, one: bool
    ) -> None:
        """Values within 1e-4 of float64's and gradients within 1e-3 of its largest, and 1e-6 of the largest input."""
        sizes = [x[: 1 if one else None].shape for x in case.tensors[:2]]
        s, t = hostile(student, sizes[0], 2 * seed, case.values), hostile(teacher, sizes[1], 2 * seed + 1, case.values)
        value, gradient = case.with_gradient(s, t, torch.float32)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        if case.near:
            exact, expected = case.with_gradient(s, t, torch.float64)
            rounding = 1e-6 * max(1.0, s.abs().max().item(), t.abs().max().item())
            torch.testing.assert_close(value, exact.float(), rtol=1e-4, atol=rounding)
            atol = 1e-3 * expected.abs().max().item() + rounding
            torch.testing.assert_close(gradient, expected.float(), rtol=0.0, atol=atol)

    def test_of_one_class_or_entry_it_is_finite(self, case: Case) -> None:
        if case.values != "free" or case.tensors[0].ndim > 3 or len(case.tensors) > 2 or case.options.keys() & SIZED:
            pytest.skip("its last axis is no number of classes or entries of its own")
        value, gradient = case.with_gradient(case.tensors[0][..., :1], case.tensors[1][..., :1], torch.float32)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()

    def test_of_no_examples_it_is_a_zero_with_a_graph(self, case: Case) -> None:
        value, gradient = case.with_gradient(*(x[:0] for x in case.tensors[:2]), torch.float32)
        assert value.item() == 0.0
        assert gradient.shape == case.tensors[0][:0].shape

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_in_is_nan_out(self, case: Case, side: int) -> None:
        places = case.reads(side).nonzero()
        if not len(places):
            pytest.skip("does not read it")
        for place in (None, *places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:5]]):
            given = [x.float() for x in case.tensors[:2]]
            given[side] = given[side].clone()
            given[side][... if place is None else tuple(place)] = torch.nan
            value, _ = case.with_gradient(*given, torch.float32)
            assert torch.isnan(value), f"NaN at {place}"

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
