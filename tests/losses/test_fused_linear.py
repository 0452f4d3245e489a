from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_lightning.losses import SoftTargetLoss, chunked_linear
from kd_lightning.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from kd_lightning.losses.fused_linear import FusedLinearKDLoss, chunked_soft_target, fused_linear_kd
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.training.schedules import Linear
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.pair import in_two

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
V = 23  # words


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a call, the last one shorter, and several blocks a chunk."""
    monkeypatch.setattr(chunked_linear, "CHUNK_BYTES", 5 * V * 8)
    monkeypatch.setattr(chunked_linear, "BLOCK_BYTES", 2 * V * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@dataclass
class Case:
    """The tensors of one call: student (N, 5) -> V, teacher (N, 4) -> V, with biases."""

    h_s: Tensor
    h_t: Tensor
    w_s: Tensor
    w_t: Tensor
    labels: Tensor
    b_s: Tensor
    b_t: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.h_s, self.w_s, self.b_s]

    def to(self, dtype: torch.dtype) -> Case:
        tensors = {
            name: x.detach().to(dtype)
            for name, x in vars(self).items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        case = replace(self, **tensors)
        for leaf in case.leaves:
            leaf.requires_grad_()
        return case

    def fused(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        arguments = {"student_bias": self.b_s, "teacher_bias": self.b_t, "labels": self.labels, **options}
        return fused_linear_kd(self.h_s, self.h_t, self.w_s, self.w_t, **arguments)

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.h_s @ self.w_s.T + self.b_s, self.h_t @ self.w_t.T + self.b_t


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, V, (16,), generator=generator)
    labels[::5] = IGNORE
    return Case(randn(16, 5), randn(16, 4), randn(V, 5), randn(V, 4), labels, randn(V), randn(V)).to(torch.float64)


def divergence_of_probabilities(p_t: Any, p_s: Any, divergence: str, beta: float, kl: Callable[..., Any]) -> Any:
    if divergence == "forward_kl":
        return kl(p_t, p_s)
    if divergence == "reverse_kl":
        return kl(p_s, p_t)
    m = beta * p_t + (1 - beta) * p_s
    return beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)


def by_scipy(case: Case, divergence: str = "forward_kl", temperature: float = 1.0, beta: float = 0.5) -> np.ndarray:
    """T^2 D of every row, by scipy's relative entropy of probabilities."""
    p_s, p_t = (softmax(z.detach().double().numpy() / temperature, axis=-1) for z in case.logits())
    values = divergence_of_probabilities(p_t, p_s, divergence, beta, lambda p, q: entropy(p, q, axis=-1))
    return np.asarray(temperature**2 * values)


def plain(case: Case, counts: Tensor, divergence: str, temperature: float, beta: float, weights: tuple[float, float],
          smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """The weighted loss as the formula says it, on probabilities of all the logits; autograd does the rest."""
    z_s, z_t = (z[counts] for z in case.logits())
    q = torch.full_like(z_s, smoothing / V).scatter_add(
        1, case.labels[counts][:, None], torch.full((len(z_s), 1), 1 - smoothing, dtype=z_s.dtype)
    )
    ce = -(q * torch.log(z_s.softmax(-1))).sum() / counts.sum()
    p_s, p_t = (z_s / temperature).softmax(-1), (z_t.detach() / temperature).softmax(-1)
    rows = divergence_of_probabilities(p_t, p_s, divergence, beta, lambda p, q: (p * torch.log(p / q)).sum(-1))
    return weights[0] * ce + weights[1] * temperature**2 * rows.sum() / counts.sum()


def gradients(loss: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, case.leaves)


# -- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_values_in_scipy(case: Case, divergence: str, temperature: float) -> None:
    known = (case.labels != IGNORE).numpy()
    loss, ce, kd = case.fused(divergence=divergence, temperature=temperature, beta=0.3, ce_weight=0.2, kd_weight=0.7)
    expected_kd = by_scipy(case, divergence, temperature, 0.3)[known].mean()
    log_probs = log_softmax(case.logits()[0].detach().numpy(), axis=-1)[known]
    expected_ce = -log_probs[np.arange(known.sum()), case.labels.numpy()[known]].mean()
    assert kd.item() == pytest.approx(expected_kd, rel=1e-10)
    assert ce.item() == pytest.approx(expected_ce, rel=1e-10)
    assert loss.item() == pytest.approx(0.2 * expected_ce + 0.7 * expected_kd, rel=1e-10)
    assert not ce.requires_grad
    assert not kd.requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_those_of_the_plain_loss_in_float64(
    case: Case, divergence: str, dtype: torch.dtype, tolerance: float, smoothing: float
) -> None:
    expected_loss = plain(case, case.labels != IGNORE, divergence, 3.0, 0.3, (0.4, 0.6), smoothing)
    expected = gradients(expected_loss, case)
    narrow = case.to(dtype)
    loss = narrow.fused(
        divergence=divergence, temperature=3.0, beta=0.3, ce_weight=0.4, kd_weight=0.6, label_smoothing=smoothing
    )[0]
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    for actual, exact in zip(gradients(loss, narrow), expected, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_packages_own_losses_of_the_logits(case: Case, dtype: torch.dtype) -> None:
    case = case.to(dtype)
    mask = torch.arange(16) % 3 != 1
    counts = mask & (case.labels != IGNORE)
    z_s, z_t = case.logits()
    apart = 0.5 * cross_entropy(z_s, case.labels.masked_fill(~mask, IGNORE), 0.1) + 0.5 * soft_target(
        z_s, z_t, 4.0, counts
    )
    loss = case.fused(temperature=4.0, mask=mask, label_smoothing=0.1)[0]
    torch.testing.assert_close(loss, apart)
    for actual, expected in zip(gradients(loss, case), gradients(apart, case), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_divergence_alone(case: Case) -> None:
    mask = torch.arange(16) % 3 != 1
    arguments = case.h_s, case.h_t, case.w_s, case.w_t
    for divergence in DIVERGENCES:
        value = chunked_soft_target(
            *arguments, mask, student_bias=case.b_s, teacher_bias=case.b_t, temperature=2.0, divergence=divergence
        )  # type: ignore[arg-type]
        assert value.item() == pytest.approx(by_scipy(case, divergence, 2.0)[mask.numpy()].mean(), rel=1e-10)
    bare = chunked_soft_target(*arguments, temperature=2.0)
    expected = soft_target(case.h_s @ case.w_s.T, case.h_t @ case.w_t.T, 2.0)
    torch.testing.assert_close(bare, expected)
    torch.testing.assert_close(torch.autograd.grad(bare, case.w_s), torch.autograd.grad(expected, case.w_s))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(case: Case, divergence: str) -> None:
    def loss(h_s: Tensor, w_s: Tensor, b_s: Tensor) -> Tensor:
        return replace(case, h_s=h_s, w_s=w_s, b_s=b_s).fused(divergence=divergence, temperature=2.0, beta=0.2)[0]

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_zero_where_student_and_teacher_agree(case: Case, divergence: str) -> None:
    same = replace(case, h_t=case.h_s, w_t=case.w_s, b_t=case.b_s + 3.0).to(torch.float32)  # softmax knows no offset
    loss = same.fused(divergence=divergence, temperature=2.0, ce_weight=0.0, kd_weight=1.0)[0]
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    for gradient in gradients(loss, same):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_a_gradient_step_goes_towards_the_teacher(case: Case) -> None:
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "ce_weight": 0.0, "kd_weight": 1.0}
        loss = case.fused(**options)[0]
        nearer = replace(case, w_s=case.w_s - 0.1 * torch.autograd.grad(loss, case.w_s)[0])
        assert nearer.fused(**options)[0] < loss


# -- which positions count --------------------------------------------------------------------------------------------


def test_rows_that_do_not_count_get_no_gradient_and_change_nothing(case: Case) -> None:
    case.h_s.data[::5], case.h_t.data[::5] = float("nan"), float("inf")  # they must not be touched at all
    loss = case.fused()[0]
    loss.backward()
    assert torch.isfinite(loss)
    assert case.h_s.grad is not None
    assert (case.h_s.grad[::5] == 0).all()
    assert (case.h_s.grad[case.labels != IGNORE] != 0).all()
    assert case.w_s.grad is not None
    assert torch.isfinite(case.w_s.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_nothing_counts_it_is_zero_with_a_graph(case: Case, dtype: torch.dtype) -> None:
    case = case.to(dtype)
    for options in ({}, {"count": 0.0}, {"count": torch.tensor(0)}):
        loss, ce, kd = case.fused(mask=torch.zeros(16, dtype=torch.bool), **options)
        assert (loss.item(), ce.item(), kd.item()) == (0.0, 0.0, 0.0)
        for gradient, leaf in zip(gradients(loss, case), case.leaves, strict=True):
            assert gradient.shape == leaf.shape
            assert (gradient == 0).all()


def test_calls_divided_by_the_common_count_add_up_to_the_whole(case: Case) -> None:
    whole = case.fused()[0]
    expected = gradients(whole, case)
    parts = [slice(0, 3), slice(3, 11), slice(11, 16)]
    count = (case.labels != IGNORE).sum()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        one = replace(case, h_s=case.h_s[part], h_t=case.h_t[part], labels=case.labels[part])
        loss = one.fused(count=count)[0]
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    assert case.fused(count=float(count))[0].item() == whole.item()


@pytest.mark.parametrize("classes", [V, V - 3])
def test_classes_cut_the_divergence_on_both_sides(case: Case, classes: int) -> None:
    wider = replace(case, w_t=torch.cat([case.w_t, torch.full((2, 4), 9.0)]), b_t=torch.cat([case.b_t, torch.ones(2)]))
    z_s, z_t = wider.logits()
    expected = 0.5 * cross_entropy(z_s, case.labels) + 0.5 * soft_target(
        z_s[:, :classes], z_t[:, :classes], 2.0, case.labels != IGNORE
    )
    loss = wider.fused(classes=classes, temperature=2.0)[0]
    torch.testing.assert_close(loss, expected)
    for actual, exact in zip(gradients(loss, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(actual, exact)


# -- as a part of training --------------------------------------------------------------------------------------------


def test_sequences_may_be_strided(case: Case) -> None:
    flat = case.fused()[0]
    h_s = case.h_s.detach().view(4, 4, 5).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not h_s.is_contiguous()
    sequences = replace(case, h_s=h_s, h_t=case.h_t.view(4, 4, 4), labels=case.labels.view(4, 4))
    loss = sequences.fused(mask=torch.ones(4, 4, dtype=torch.bool))[0]
    assert loss.item() == flat.item()
    expected = torch.autograd.grad(flat, case.h_s)[0]
    assert torch.equal(torch.autograd.grad(loss, h_s)[0], expected.view(4, 4, 5))


class Largest(TorchDispatchMode):
    """Remembers the sizes of what every operation makes, and the rows of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.product_rows, self.products = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            self.products += 1
        if func is torch.ops.aten.mm.out:
            self.product_rows += len(result)
        return result


def test_never_holds_tokens_times_vocabulary(case: Case) -> None:
    with Largest() as largest:
        case.fused()[0].backward()
    assert largest.elements == V * 5  # the matrix gradient; a chunk has 4 V
    assert largest.product_rows == 2 * (case.labels != IGNORE).sum()  # student and teacher, only rows that count


def test_work_for_gradients_nobody_needs_is_skipped(case: Case) -> None:
    def products(run: Callable[[], object]) -> int:
        with Largest() as largest:
            run()
        return largest.products

    chunks = 3  # of 12 rows that count
    assert products(lambda: case.fused()) == 4 * chunks
    with torch.no_grad():
        assert products(lambda: case.fused()) == 2 * chunks
        assert not case.fused()[0].requires_grad
    expected = gradients(case.fused()[0], case)
    for frozen, left in (("w_s", "h_s"), ("h_s", "w_s")):
        one = replace(case, **{frozen: getattr(case, frozen).detach()})
        assert products(lambda one=one: one.fused()) == 3 * chunks  # type: ignore[misc]
        actual = torch.autograd.grad(one.fused()[0], [getattr(one, left), one.b_s])
        torch.testing.assert_close(actual, (expected[0] if left == "h_s" else expected[1], expected[2]))
    with torch.no_grad():
        value = case.fused()[0]
    assert value.item() == case.fused()[0].item()


def test_upstream_gradient_and_a_second_backward_pass(case: Case) -> None:
    expected = gradients(case.fused()[0], case)
    loss = 3 * case.fused()[0]
    for _ in range(2):
        for actual, one in zip(torch.autograd.grad(loss, case.leaves, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(actual, 3 * one)


def test_a_second_derivative_is_refused(case: Case) -> None:
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.fused()[0], case.h_s, create_graph=True)


def test_the_teacher_gets_no_gradient(case: Case) -> None:
    teacher = [case.h_t.requires_grad_(), case.w_t.requires_grad_(), case.b_t.requires_grad_()]
    case.fused()[0].backward()
    assert [x.grad for x in teacher] == [None, None, None]
    with torch.inference_mode():
        made_in_inference_mode = case.h_t * 1.0
    replace(case, h_t=made_in_inference_mode).fused()[0].backward()


def test_a_matrix_tied_with_the_embedding(case: Case) -> None:
    tokens = torch.arange(16) % V
    embedding = case.w_s.detach().clone().requires_grad_()
    tied = replace(case, h_s=embedding[tokens].tanh(), w_s=embedding)
    actual = torch.autograd.grad(tied.fused(temperature=2.0)[0], embedding)[0]
    tied = replace(case, h_s=embedding[tokens].tanh(), w_s=embedding)
    expected = plain(tied, case.labels != IGNORE, "forward_kl", 2.0, 0.5, (0.5, 0.5))
    torch.testing.assert_close(actual, torch.autograd.grad(expected, embedding)[0])


def test_bfloat16_autocast(case: Case) -> None:
    exact = case.fused(temperature=2.0)[0]
    case32 = case.to(torch.float32)
    chunked_linear.CHUNK_BYTES = 5 * V * 2
    with torch.autocast("cpu", torch.bfloat16):
        with Largest() as largest:
            loss, ce, kd = case32.fused(temperature=2.0)
        z_s, z_t = (nn.functional.linear(*x) for x in ((case32.h_s, case32.w_s), (case32.h_t, case32.w_t)))
    assert z_s.dtype == torch.bfloat16
    assert largest.elements == V * 5
    assert {loss.dtype, ce.dtype, kd.dtype} == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for actual, expected in zip(gradients(loss, case32), gradients(exact, case), strict=True):
        assert actual.dtype == torch.float32
        assert (actual.double() - expected).norm() < 2e-2 * expected.norm()
    # softmax math is not in bfloat16: the value is the float32 loss of the bfloat16 logits
    with torch.autocast("cpu", torch.bfloat16):
        value = chunked_soft_target(case32.h_s, case32.h_t, case32.w_s, case32.w_t, temperature=2.0)
    torch.testing.assert_close(value, soft_target(z_s, z_t, 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64(case: Case, dtype: torch.dtype) -> None:
    narrow = case.to(dtype)
    wide = narrow.to(torch.float64)
    loss, exact = (x.fused(temperature=2.0)[0] for x in (narrow, wide))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for actual, expected in zip(gradients(loss, narrow), gradients(exact, wide), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() < 2e-2 * expected.norm()


def test_the_matrix_gradient_is_summed_in_float32(case: Case) -> None:
    # many chunks, each far smaller than their sum: bfloat16 sums would stop growing
    h_s = torch.ones(600, 1, dtype=torch.bfloat16)
    w_s, w_t = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True), torch.zeros(2, 1, dtype=torch.bfloat16)
    chunked_linear.CHUNK_BYTES = 4  # one row each
    loss = fused_linear_kd(h_s, h_s, w_s, w_t, torch.zeros(600, dtype=torch.long), ce_weight=1.0, count=1.0)[0]
    assert torch.autograd.grad(loss, w_s)[0][:, 0].tolist() == [-300.0, 300.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_large_logits_stay_finite(dtype: torch.dtype, divergence: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    h_s, h_t, w_s, w_t = (
        (100 * torch.randn(n, 1, generator=generator)).clamp(-200, 200).to(dtype) for n in (8, 8, V, V)
    )
    w_s.requires_grad_(), h_s.requires_grad_()
    z = [(h.detach().float() @ w.detach().float().T).to(dtype).double().numpy() for h, w in ((h_s, w_s), (h_t, w_t))]
    assert 1e4 < np.abs(z).max() < 6.5e4
    value = chunked_soft_target(h_s, h_t, w_s, w_t, temperature=temperature, divergence=divergence)  # type: ignore[arg-type]
    log_s, log_t = (log_softmax(x / temperature, axis=-1) for x in z)
    log_m = np.logaddexp(log_s, log_t) - np.log(2)
    kl = lambda p, q: (np.exp(p) * (p - q)).sum(-1)  # noqa: E731
    jsd = 0.5 * (kl(log_t, log_m) + kl(log_s, log_m))
    each = {"forward_kl": kl(log_t, log_s), "reverse_kl": kl(log_s, log_t), "jsd": jsd}
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(temperature**2 * each[divergence].mean(), rel=1e-5)
    if (dtype, divergence) != (torch.float16, "reverse_kl"):  # there the gradient itself is beyond float16's 65,504
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(value, [h_s, w_s]))


class Model(nn.Module):
    """A student with tied embedding that returns its loss."""

    def __init__(self, w_t: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(V, 5, generator=generator))
        self.mix = nn.Parameter(torch.randn(5, 5, generator=generator))
        self.w_t = w_t

    def forward(self, h_t: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
        hidden = (self.embedding[labels.clamp(min=0)] @ self.mix).tanh()
        return fused_linear_kd(hidden, h_t, self.embedding, self.w_t, labels, temperature=2.0, count=count).loss * 2


@pytest.mark.slow
def test_a_compiled_model_equals_eager(case: Case) -> None:
    case = case.to(torch.float32)
    results = []
    for compiled in (False, True):
        model = Model(case.w_t)
        loss = (torch.compile(model) if compiled else model)(case.h_t, case.labels)
        loss.backward()
        results.append((loss.detach(), model.embedding.grad, model.mix.grad))
    torch.testing.assert_close(results[1], results[0])


def _rank(rank: int, h_t: Tensor, w_t: Tensor, labels: Tensor) -> list[Tensor | None]:
    model = nn.parallel.DistributedDataParallel(Model(w_t))
    part = slice(0, 6) if rank == 0 else slice(6, 16)  # unequal numbers of tokens
    model(h_t[part], labels[part], (labels != IGNORE).sum() / 2).backward()
    return [x.grad for x in model.parameters()]


@pytest.mark.slow
def test_two_processes_get_the_gradients_of_one(case: Case, tmp_path: Path) -> None:
    case = case.to(torch.float32)
    h_t, w_t = case.h_t.detach(), case.w_t.detach()
    found = in_two(_rank, tmp_path, h_t, w_t, case.labels)
    model = Model(w_t)
    model(h_t, case.labels).backward()
    expected = [x.grad for x in model.parameters()]
    torch.testing.assert_close(found, [expected, expected])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"divergence": "kl"}, "divergence must be forward_kl, reverse_kl or jsd, got 'kl'"),
        ({"beta": 1.0}, r"beta must be in \(0, 1\), got 1.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"labels": None}, "ce_weight is 0.5, but there are no labels"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask is for positions \(3,\).*\(16,\)"),
        ({"labels": torch.zeros(16, 1, dtype=torch.long)}, r"labels is for positions \(16, 1\).*\(16,\)"),
        ({"classes": V + 1}, f"classes={V + 1}, but the student has {V} and the teacher {V}"),
    ],
)
def test_refuses(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.fused(**options)


def test_refuses_sides_that_do_not_fit(case: Case) -> None:
    with pytest.raises(ValueError, match=rf"student's vocabulary has {V} words and the teacher's {V - 1}.*`classes`"):
        replace(case, w_t=case.w_t[:-1]).fused()
    with pytest.raises(ValueError, match=r"teacher_hidden is for positions \(15,\).*\(16,\)"):
        replace(case, h_t=case.h_t[:-1]).fused()


# -- the term ---------------------------------------------------------------------------------------------------------


def outputs(case: Case) -> tuple[ModelOutput, ModelOutput, Batch]:
    """Student and teacher of 4 sequences of 4 tokens, without logits."""
    nothing = torch.zeros(())
    student = {"last_hidden": case.h_s.view(4, 4, 5), "head": case.w_s, "head_bias": case.b_s}
    teacher = {"last_hidden": case.h_t.view(4, 4, 4), "head": case.w_t, "head_bias": case.b_t}
    batch = {"labels": case.labels.view(4, 4), "keep": torch.ones(4, 4, dtype=torch.bool)}
    return ModelOutput(nothing, student), ModelOutput(nothing, teacher), batch


@pytest.mark.parametrize("shifted", [False, True])
def test_the_term_counts_as_the_terms_of_the_logits_do(case: Case, shifted: bool) -> None:
    student, teacher, batch = outputs(case)
    if shifted:
        batch = next_tokens(batch | {"input_ids": batch["labels"]})
    value = FusedLinearKDLoss(2.0, ce_weight=0.3, kd_weight=0.7)(student, teacher, batch)
    logits = [ModelOutput(z.view(4, 4, V)) for z in case.logits()]
    known = batch | {"keep": batch["keep"] & (batch["labels"] != IGNORE)}
    expected = 0.3 * CrossEntropyLoss()(*logits, batch) + 0.7 * SoftTargetLoss(2.0)(*logits, known)
    torch.testing.assert_close(value, expected)
    for actual, exact in zip(gradients(value, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(actual, exact)


def test_the_term_without_a_cross_entropy_counts_all_that_is_kept(case: Case) -> None:
    student, teacher, batch = outputs(case)
    batch["keep"] = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    term = FusedLinearKDLoss(2.0, ce_weight=0.0, kd_weight=1.0, classes=V - 1)
    logits = [ModelOutput(z.view(4, 4, V)) for z in case.logits()]
    torch.testing.assert_close(term(student, teacher, batch), SoftTargetLoss(2.0, classes=V - 1)(*logits, batch))


def test_the_terms_temperature_follows_its_schedule(case: Case) -> None:
    student, teacher, batch = outputs(case)
    term = FusedLinearKDLoss(Linear(start=8.0, end=2.0))
    for progress, temperature in [(0.0, 8.0), (1.0, 2.0)]:
        term.progress = progress
        assert term.settings() == {"temperature": temperature}
        assert term(student, teacher, batch).item() == pytest.approx(case.fused(temperature=temperature)[0].item())


def test_the_term_names_a_feature_that_is_missing(case: Case) -> None:
    student, teacher, batch = outputs(case)
    del teacher.features["head"]
    with pytest.raises(ValueError, match=r"teacher's features \['head_bias', 'last_hidden'\] lack \['head'\]"):
        FusedLinearKDLoss()(student, teacher, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divergence", "dtype"), [("forward_kl", torch.bfloat16), ("reverse_kl", torch.float32), ("jsd", torch.bfloat16)]
)
def test_what_a_gpu_compiles_is_what_a_cpu_computes(divergence: str, dtype: torch.dtype) -> None:
    """Temperatures, weights and numbers of rows that change are compiled once more, and not each time."""
    torch.compiler.reset()
    chunked_linear._compiled_block.cache_clear()
    for rows, temperature, weight in ((37, 2.0, 0.5), (50, 3.3, 0.1), (12, 1.5, 0.7), (21, 2.5, 0.2), (44, 1.0, 0.3)):
        generator = torch.Generator().manual_seed(rows)
        z_s, z_t = ((torch.randn(rows, 90, generator=generator) * 10).to(dtype) for _ in range(2))
        labels = torch.randint(90, (rows,), generator=generator)
        numbers = (weight, 1 - weight, temperature, divergence, 0.4, 0.0, 80)
        given = z_s.clone()
        with torch._dynamo.config.patch(error_on_recompile=rows not in (37, 50)):
            found = chunked_linear._compiled_block()(given, z_t[:, :80], labels, *numbers)
        assert torch.equal(given, z_s), "it writes into none of its arguments"
        expected = chunked_linear._block(z_s, z_t[:, :80], labels, *numbers)
        for value, other in zip(found, expected, strict=True):
            rounding = 1e-2 if value.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(value, other, rtol=rounding, atol=1e-4)
