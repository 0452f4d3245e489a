"""The losses of starts and ends: their values, masks, hostile inputs, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.soft_target import SoftTargetLoss
from kd_lightning.losses.span_labels import SpanLabelsLoss, span_labels
from kd_lightning.losses.span_soft_target import SpanSoftTargetLoss, span_soft_target
from kd_lightning.types import IGNORE, Batch, ModelOutput

KEEP = torch.tensor([[1, 0, 1, 1, 1], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
LABELS = torch.tensor([[0, IGNORE, 1, 0, 2], [3, IGNORE, IGNORE, 0, IGNORE], [IGNORE] * 5])


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 5, 2, generator=generator, dtype=dtype) * 2 for _ in range(2))  # type: ignore[return-value]


def plain_kl(student: list[float], teacher: list[float], temperature: float) -> float:
    def softmax(values: list[float]) -> list[float]:
        exps = [math.exp(value / temperature) for value in values]
        return [one / sum(exps) for one in exps]

    p, q = softmax(teacher), softmax(student)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets_are_those_of_plain_python(temperature: float) -> None:
    student, teacher = pair()
    expected = []
    for row in range(3):
        kept = KEEP[row]
        sides = [plain_kl(student[row, kept, c].tolist(), teacher[row, kept, c].tolist(), temperature) for c in (0, 1)]
        expected.append(temperature**2 * sum(sides) / 2)
    found = span_soft_target(student, teacher, temperature, KEEP, "none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(span_soft_target(student, teacher, temperature, KEEP), found.mean())


def test_labels_are_those_of_plain_python() -> None:
    logits, _ = pair()
    rows = [(0, 2, 4), (1, 0, 0)]
    expected = []
    for row, start, end in rows:
        total = [logits[row, KEEP[row], c].logsumexp(0) for c in (0, 1)]
        expected.append(float((total[0] - logits[row, start, 0] + total[1] - logits[row, end, 1]) / 2))
    found = span_labels(logits, LABELS, KEEP, "none")
    torch.testing.assert_close(found, torch.tensor([*expected, 0.0], dtype=torch.float64))
    assert float(span_labels(logits, LABELS, KEEP)) == pytest.approx(sum(expected) / 2)
    assert SpanLabelsLoss().counts({"labels": LABELS, "keep": KEEP}).tolist() == [2.0]


def losses(student: Tensor, teacher: Tensor, keep: Tensor) -> list[Tensor]:
    return [span_soft_target(student, teacher, 2.0, keep), span_labels(student, LABELS, keep)]


def test_gradients_and_zero_at_equality() -> None:
    student, teacher = pair()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses(x, teacher, KEEP), (student,))
    value = span_soft_target(student, student.detach(), 2.0, KEEP)
    (gradient,) = torch.autograd.grad(value, student)
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("at_masked", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_masked_positions_reach_neither_value_nor_gradient(at_masked: float) -> None:
    student, teacher = pair(torch.float32)
    found = []
    for fill in (0.0, at_masked):
        one = student.masked_fill(~KEEP.unsqueeze(2), fill).requires_grad_()
        values = losses(one, teacher.masked_fill(~KEEP.unsqueeze(2), fill), KEEP)
        (gradient,) = torch.autograd.grad(sum(values), one)  # type: ignore[arg-type]
        found.append((torch.stack(values), gradient))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not found[0][1][~KEEP].any()


@pytest.mark.parametrize("scale", [1e-40, 50.0, 1e4])
def test_hostile_inputs_have_finite_gradients(scale: float) -> None:
    student, teacher = pair(torch.float32)
    for one, other in ((student, -student), (torch.zeros_like(student), teacher), (teacher, torch.zeros_like(teacher))):
        logits = (one * scale).requires_grad_()
        values = losses(logits, other * scale, KEEP)
        (gradient,) = torch.autograd.grad(sum(values), logits)  # type: ignore[arg-type]
        assert all(value.isfinite() for value in values)
        assert gradient.isfinite().all()


def test_nan_that_counts_is_nan_and_nothing_kept_is_zero_with_a_graph() -> None:
    student, teacher = pair(torch.float32)
    student[0, 2, 0] = torch.nan
    assert all(value.isnan() for value in losses(student, teacher, KEEP))
    logits = pair(torch.float32)[0].requires_grad_()
    for value in losses(logits, teacher, torch.zeros_like(KEEP)):
        assert float(value.detach()) == 0.0
        (gradient,) = torch.autograd.grad(value, logits)
        assert not gradient.any()


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = pair(torch.float32)
    halves = student.bfloat16(), teacher.bfloat16()
    wide = losses(halves[0].float(), halves[1].float(), KEEP)
    for value, expected in zip(losses(*halves, KEEP), wide, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


def test_more_padding_changes_nothing() -> None:
    student, teacher = pair()
    wider = [torch.nn.functional.pad(x, (0, 0, 0, 3), value=9.0) for x in (student, teacher)]
    keep = torch.nn.functional.pad(KEEP, (0, 3))
    labels = torch.nn.functional.pad(LABELS, (0, 3), value=IGNORE)
    torch.testing.assert_close(span_soft_target(*wider, 2.0, keep), span_soft_target(student, teacher, 2.0, KEEP))
    torch.testing.assert_close(span_labels(wider[0], labels, keep), span_labels(student, LABELS, KEEP))


def test_what_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match="must have the same shape"):
        span_soft_target(student, teacher[:, :4])
    with pytest.raises(ValueError, match="mask"):
        span_soft_target(student, teacher, mask=KEEP[:2])
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        span_soft_target(student, teacher, 0.0)
    with pytest.raises(ValueError, match=r"expected \(B, L, 2\), of starts and ends"):
        span_labels(student, LABELS[:, :3])
    with pytest.raises(ValueError, match="expected those of starts and ends"):
        span_soft_target(student[0], teacher[0])


def test_terms_read_the_batch_and_losses_on_classes_are_refused() -> None:
    student, teacher = (ModelOutput(logits) for logits in pair())
    batch: Batch = {"labels": LABELS, "keep": KEEP, "question": torch.arange(3)}
    term = SpanSoftTargetLoss(lambda progress: 1.0 + progress)
    assert term.settings() == {"temperature": 1.0}
    torch.testing.assert_close(term(student, teacher, batch), span_soft_target(student.logits, teacher.logits, 1, KEEP))
    torch.testing.assert_close(SpanLabelsLoss()(student, teacher, batch), span_labels(student.logits, LABELS, KEEP))
    assert term.counts(batch).tolist() == [3.0]
    with pytest.raises(ValueError, match="distillation=span_soft_target or another for spans"):
        SoftTargetLoss()(student, teacher, batch)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("keep", [KEEP, None])
def test_windows_without_labels_reach_no_gradient(value: float, keep: Tensor | None) -> None:
    logits = pair(torch.float32)[0]
    logits[2, 3, 0] = value  # of a row of IGNORE
    logits.requires_grad_()
    loss = span_labels(logits, LABELS.where(KEEP, IGNORE), keep)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[2].any()
