"""Computes losses chunk by chunk from hidden states; formulas in `fused_linear` and `sparse`.

Shape suffixes: N positions, n of a chunk or block, V words, H the width of a side's hidden states.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_lightning.losses.term import at_least_float32
from kd_lightning.types import IGNORE

CHUNK_BYTES = 128 * 2**20
"""Size of one side's logits of a chunk: with much fewer tokens the matrix products are slow, more only cost memory.

On a GPU four times as much: each chunk adds to a gradient as large as the matrix, through the same memory."""

BLOCK_BYTES = 2**20
"""On a CPU, softmax math is done on so many bytes of logits a thread at a time: its passes then stay in the cache."""

Layer = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, matrix and bias of one side's last layer."""


@dataclass(frozen=True)
class Options:
    """The numbers of one call."""

    ce_weight: float
    kd_weight: float
    temperature: float
    divergence: str
    beta: float
    label_smoothing: float
    classes: int

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if self.divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(f"divergence must be forward_kl, reverse_kl or jsd, got {self.divergence!r}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta must be in (0, 1), got {self.beta}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class _Side:
    """One side's last layer, flattened to `(N, H)` and with the matrix in the precision of the products."""

    hidden: Tensor
    matrix: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> _Side:
        dtype, device = torch.promote_types(hidden.dtype, matrix.dtype), hidden.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return cls(hidden.reshape(-1, hidden.shape[-1]), matrix.to(dtype), bias)

    def inputs(self, pick: Tensor | slice) -> Tensor:
        return self.hidden[pick].to(self.matrix.dtype)

    def logits(self, inputs: Tensor, out: Tensor) -> None:
        torch.mm(inputs, self.matrix[: out.shape[1]].T, out=out)
        if self.bias is not None:
            out.add_(self.bias[: out.shape[1]])


class Compared(Protocol):
    """What the student's logits are compared with, a chunk at a time."""

    ce_weight: float
    kd_weight: float

    def begin(self, rows: int) -> None:
        """Make room for chunks of at most so many rows."""

    def values_and_gradient(
        self, z_s: Tensor, pick: Tensor | slice, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows' CE and D, `(n,)`, and their weighted sum's gradient; may overwrite `z_s`."""


class DenseTeacher:
    """A teacher's last layer, whose logits are made as they are needed.

    Args:
        layer: Hidden states, matrix and bias.
        options: How they are compared.
    """

    def __init__(self, layer: Layer, options: Options) -> None:
        self.side, self.options = _Side.of(*layer), options
        self.ce_weight, self.kd_weight = options.ce_weight, options.kd_weight

    def begin(self, rows: int) -> None:
        """Make room for a chunk's logits."""
        self.logits = self.side.matrix.new_empty(rows, self.options.classes)

    def values_and_gradient(
        self, z_s: Tensor, pick: Tensor | slice, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare with the teacher's logits of these rows."""
        z_t = self.logits[: len(z_s)]
        self.side.logits(self.side.inputs(pick), out=z_t)
        labels = None if self.ce_weight == 0 else labels
        numbers = astuple(self.options)
        if z_s.is_cuda and HAS_TRITON:
            return _compiled_block()(z_s, z_t, labels, *numbers)

        def block(at: slice) -> tuple[Tensor, Tensor, Tensor]:
            return _block(z_s[at], z_t[at], None if labels is None else labels[at], *numbers)

        return blockwise(z_s, block)


@dataclass
class NoTeacher:
    """Nothing but the labels.

    Attributes:
        label_smoothing: epsilon in [0, 1).
    """

    label_smoothing: float
    ce_weight: float = 1.0
    kd_weight: float = 0.0

    def begin(self, rows: int) -> None:
        """Need no room."""

    def values_and_gradient(
        self, z_s: Tensor, pick: Tensor | slice, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare with the labels."""
        assert labels is not None

        def block(at: slice) -> tuple[Tensor, Tensor, Tensor]:
            ce, gradient = _cross_entropy(at_least_float32(z_s[at]), labels[at], self.label_smoothing)
            return ce, torch.zeros_like(ce), gradient.to(z_s.dtype)

        return block(slice(None)) if z_s.is_cuda else blockwise(z_s, block)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_linear(
    student: Layer,
    teacher: Layer,
    labels: Tensor | None,
    mask: Tensor | None,
    options: Options,
    count: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its two parts, all divided by the number of positions that count."""
    found: tuple[Tensor, Tensor, Tensor] = chunked_sums(student, DenseTeacher(teacher, options), labels, mask, count)
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_sums(
    student: Layer, teacher: Compared, labels: Tensor | None, mask: Tensor | None, count: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its two parts, all divided by the number of positions that count."""
    rows = _rows_that_count(student[0].shape[:-1], labels, mask)
    if labels is not None:
        labels = labels.flatten()
    sums = _FusedLinear.apply(*student, teacher, labels, rows, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    if count is None:
        count = max(student[0].shape[:-1].numel() if rows is None else len(rows), 1)
    # of several calls that all count nothing, `count` is 0, and so is the mean
    n = torch.as_tensor(count, dtype=sums[0].dtype, device=sums[0].device).clamp(min=torch.finfo(sums[0].dtype).tiny)
    return sums[0] / n, sums[1] / n, sums[2] / n


class _FusedLinear(torch.autograd.Function):
    """Sums the weighted loss and its two parts over the rows; computes gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        teacher: Compared,
        labels: Tensor | None,
        rows: Tensor | None,
        grad_enabled: bool,  # as the caller has it: in here it is always off
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = [grad_enabled and needs for needs in ctx.needs_input_grad[:3]]
        student = _Side.of(hidden, matrix, bias)
        with torch.autocast(hidden.device.type, enabled=False):  # it would redo the casts, and cannot fill a buffer
            ce, kd, gradients = _all_chunks(student, teacher, labels, rows, needed)
        ctx.save_for_backward(*gradients)
        ctx.inputs = [(x.shape, x.dtype) if x is not None else None for x in (hidden, matrix, bias)]
        ctx.mark_non_differentiable(ce, kd)
        return teacher.ce_weight * ce + teacher.kd_weight * kd, ce, kd

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let a part of it pass as constant
            raise RuntimeError("fused_linear_kd has no second derivative; use the losses of the logits for one")
        gradients = (
            None if gradient is None else (gradient * upstream).to(of[1]).view(of[0])
            for gradient, of in zip(ctx.saved_tensors, ctx.inputs, strict=True)
        )
        return *gradients, None, None, None, None


def _all_chunks(
    student: _Side, teacher: Compared, labels: Tensor | None, rows: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the sums of CE and D, and the weighted sum's gradients for hidden, matrix and bias."""
    count = len(student.hidden) if rows is None else len(rows)
    vocabulary, dtype = len(student.matrix), student.matrix.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    at_most = CHUNK_BYTES * (4 if student.matrix.is_cuda else 1)
    chunk = _evenly(count, at_most // (vocabulary * dtype.itemsize))
    z_s = student.matrix.new_empty(chunk, vocabulary)
    teacher.begin(chunk)
    ce, kd = student.matrix.new_zeros(2, count, dtype=wide)
    d_hidden, d_matrix, d_bias = (
        x.new_zeros(x.shape, dtype=wide) if needs and x is not None else None
        for x, needs in zip((student.hidden, student.matrix, student.bias), needed, strict=True)
    )
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        pick = slice(start, stop) if rows is None else rows[start:stop]
        inputs, z = student.inputs(pick), z_s[: stop - start]
        student.logits(inputs, out=z)
        chosen = None if labels is None else labels[pick]
        ce[start:stop], kd[start:stop], z = teacher.values_and_gradient(z, pick, chosen)
        if d_hidden is not None:
            d_hidden[pick] = (z @ student.matrix).to(wide)
        if d_matrix is not None and dtype == wide:
            d_matrix.addmm_(z.T, inputs)
        elif d_matrix is not None:
            d_matrix.add_(z.T @ inputs)
        if d_bias is not None:
            d_bias.add_(z.sum(0, dtype=wide))
    return ce.sum(), kd.sum(), [d_hidden, d_matrix, d_bias]


def _evenly(count: int, at_most: int) -> int:
    """Return the size of the fewest equal parts of `count` that are not larger than `at_most`."""
    parts = max(math.ceil(count / max(at_most, 1)), 1)
    return max(math.ceil(count / parts), 1)


def blockwise(
    z_s: Tensor, block: Callable[[slice], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Apply `block` to runs of rows and join the results; gradients overwrite the logits."""
    rows = torch.get_num_threads() * max(BLOCK_BYTES // (4 * z_s.shape[1]), 1)
    values = []
    for at in (slice(start, start + rows) for start in range(0, len(z_s), rows)):
        ce, kd, gradient = block(at)
        z_s[at] = gradient
        values.append(torch.stack([ce, kd]))
    ce, kd = torch.cat(values, dim=1)
    return ce, kd, z_s


def _block(
    z_s: Tensor, z_t: Tensor, labels: Tensor | None, ce_weight: float, kd_weight: float, temperature: float,
    divergence: str, beta: float, label_smoothing: float, classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`values_and_gradient` with numbers as separate arguments, so that a schedule compiles once."""
    z = at_least_float32(z_s)
    if labels is None:
        ce, gradient = z.new_zeros(len(z)), torch.zeros_like(z)
    else:
        ce, gradient = _cross_entropy(z, labels, label_smoothing)
        gradient *= ce_weight
    a_s = _divided(z[:, :classes], temperature)
    a_t = _divided(z_t.to(z.dtype), temperature)
    kd, by_scaled = _divergence(a_s, a_t, divergence, beta)
    gradient[:, :classes] += by_scaled.mul_(kd_weight * temperature)  # as `alpha` each value would be recompiled
    return ce, temperature**2 * kd, gradient.to(z_s.dtype)


HAS_TRITON = importlib.util.find_spec("triton") is not None
"""What `torch.compile` needs on a GPU, and does not have everywhere."""


@cache  # when it is first called: torch.compile is slow to import
def _compiled_block() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return `_block` in few passes over a GPU's memory in place of twenty.

    The number of words stays a constant of the compiled code, so that a GPU reads many of them at a time; numbers that
    change become variables. It writes into none of its arguments: compiled by torch 2.11 it would read what it wrote.
    """
    return torch.compile(_block)


def _cross_entropy(z: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return each row's cross-entropy `(n,)` and its gradient softmax(z) - q `(n, V)`."""
    p = z.softmax(-1)
    top = z.amax(-1)
    right = z.gather(1, labels[:, None])[:, 0]
    log_sum = -p.amax(-1).log()  # log(sum exp(z - top)), for the largest probability is 1 / that sum
    smoothing = label_smoothing * (top - z.mean(-1)) if label_smoothing else 0.0
    value = log_sum + (1 - label_smoothing) * (top - right) + smoothing
    if label_smoothing:
        p -= label_smoothing / z.shape[1]
    if torch.compiler.is_compiling():  # it goes through all of p anyway, and a scatter would need p in memory
        return value, p - (1 - label_smoothing) * (torch.arange(p.shape[1], device=p.device) == labels[:, None])
    return value, p.scatter_add_(1, labels[:, None], p.new_full((len(p), 1), label_smoothing - 1.0))


def _divided(z: Tensor, temperature: float) -> Tensor:
    """Return z / T, shifted so that each row's maximum is 0: large logits then lose nothing to rounding."""
    return (z - z.amax(-1, keepdim=True)).div_(temperature)


def _divergence(a_s: Tensor, a_t: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return D of each row `(n,)` and its gradient by `a_s` `(n, V)`, from logits / T whose maximum is 0."""
    p_s, p_t = a_s.softmax(-1), a_t.softmax(-1)
    top_s, top_t = (p.amax(-1, keepdim=True).log() for p in (p_s, p_t))  # so that log p = a + top
    if divergence == "forward_kl":
        kl = torch.linalg.vecdot(p_t, a_t - a_s) + (top_t - top_s)[:, 0]
        return kl, p_s.sub_(p_t)
    if divergence == "reverse_kl":
        ratio = (a_s - a_t).add_(top_s - top_t)
        kl = torch.linalg.vecdot(p_s, ratio)
        return kl, ratio.sub_(kl[:, None]).mul_(p_s)
    log_s, log_t = a_s.add_(top_s), a_t.add_(top_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    ratio = log_s.sub_(log_m)
    kl_s, kl_t = torch.linalg.vecdot(p_s, ratio), torch.linalg.vecdot(p_t, log_t.sub_(log_m))
    return beta * kl_t + (1 - beta) * kl_s, ratio.sub_(kl_s[:, None]).mul_(p_s).mul_(1 - beta)


def _rows_that_count(positions: torch.Size, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return the indices, among the flattened positions, of those that count; None if all do."""
    counts = labels != IGNORE if labels is not None else None
    if mask is not None:
        counts = mask if counts is None else counts & mask
    if counts is None:
        return None
    rows = counts.flatten().nonzero()[:, 0]
    return rows if len(rows) < positions.numel() else None
