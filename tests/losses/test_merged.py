"""Log probabilities of K classes and a tail, against autograd of the plain formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_lightning.losses import CrossEntropyLoss
from kd_lightning.losses.merged import merged
from kd_lightning.losses.sparse import SparseKDLoss
from kd_lightning.training.objective import Objective
from kd_lightning.types import IGNORE, Batch, ModelOutput, SparseLogits

B, L, V = 3, 40, 600


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(logits: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `merged` does, class by class, as an autograd graph of torch's own."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, False)
    tail = torch.stack([row[other].exp().sum().log() for row, other in zip(logits, others, strict=True)])
    values = torch.stack([row[chosen] for row, chosen in zip(logits, ids, strict=True)])
    right = torch.stack([row[label] for row, label in zip(logits, labels, strict=True)])
    total = logits.exp().sum(1).log()
    return torch.cat([values, tail[:, None]], dim=1) - total[:, None], right - total


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = normal(B * L, V)
    ids = normal(B * L, V, seed=1).topk(7).indices
    labels = torch.arange(B * L) % V
    labels[::3] = ids[::3, 2]  # one of the K in some rows, of the tail in others
    return logits.to(dtype), ids, labels, normal(B * L, 8, seed=2).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradient_are_those_of_autograd(dtype: torch.dtype, tolerance: float) -> None:
    """Also where rows are gone through in several runs, which they are here."""
    logits, ids, labels, upstream = given(dtype)
    expected_of, found_of = logits.double().clone().requires_grad_(), logits.clone().requires_grad_()
    expected, found = plain(expected_of, ids, labels), merged(found_of, ids, labels)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    (expected[0] * upstream.double()).sum().add(expected[1].square().sum()).backward()
    assert found[1] is not None
    (found[0] * upstream).sum().add(found[1].square().sum()).backward()
    assert expected_of.grad is not None
    assert found_of.grad is not None
    torch.testing.assert_close(found_of.grad.double(), expected_of.grad, rtol=tolerance, atol=20 * tolerance)


def test_it_has_a_second_derivative() -> None:
    logits, labels = normal(2, 9), torch.tensor([0, 7])
    ids = logits.topk(3).indices

    def value(z: Tensor) -> Tensor:
        found, right = merged(z, ids, labels)
        assert right is not None
        return found.square().sum() + right.pow(3).sum()

    assert torch.autograd.gradgradcheck(value, logits.requires_grad_())


def test_its_second_derivative_is_finite_beside_a_masked_row_of_nan_and_a_large_gap() -> None:
    """Of the first row e^(-100) is nothing beside the class, and e^100 no float32; the second counts nothing."""
    rows = torch.tensor([[100.0, 0.0, 0.0, 1.0], [torch.nan, 0.0, torch.inf, 0.0]])
    found = rows.clone().requires_grad_()
    value = merged(found, torch.tensor([[0], [0]]), torch.tensor([3, 3]), torch.tensor([True, False]))
    assert value[1] is not None
    (first,) = torch.autograd.grad(value[0].square().sum() + value[1].square().sum(), found, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), found)
    expected_of = rows[:1].double().requires_grad_()
    log_probs, right = plain(expected_of, torch.tensor([[0]]), torch.tensor([3]))
    (expected,) = torch.autograd.grad(log_probs.square().sum() + right.square().sum(), expected_of, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected.square().sum(), expected_of)
    torch.testing.assert_close(first[:1].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second[:1].double(), expected_second, rtol=1e-4, atol=1e-2)
    assert not first[1].any()
    assert not second[1].any()


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("narrow", [False, True])
def test_large_logits_and_narrow_ones_lose_nothing(k: int, narrow: bool) -> None:
    """In bfloat16 8 bits are left, in float32 logits near 10,000 are 0.001 apart: the rows here are exact in both."""
    rows = torch.tensor([[[3.0, 1.0, 0.0, -2.0, 2.0], [0.0, 0.5, 4.0, 1.0, 1.0]]])
    logits = rows.bfloat16() if narrow else rows + 1e4
    labels = torch.tensor([[1, 0]])
    batch: Batch = {"labels": labels, "keep": torch.ones(1, 2, dtype=torch.bool)}
    right = rows.double().log_softmax(-1).gather(-1, labels[..., None])
    same, other = ModelOutput(logits), ModelOutput(rows.flip(-1))
    for student in (same, ModelOutput(logits[..., :0], {"last_hidden": logits, "head": torch.eye(5).to(logits)})):
        ce, kd = SparseKDLoss(k).with_labels(student, same, batch, 0.5, 0.5)
        torch.testing.assert_close(ce.double(), -right.mean(), rtol=1e-6, atol=1e-6)
        assert ce.dtype == kd.dtype == torch.float32
        assert abs(float(kd)) < 1e-6
        apart = SparseKDLoss(k).with_labels(student, other, batch, 0.5, 0.5)[1]
        exact = SparseKDLoss(k)(ModelOutput(rows.double()), ModelOutput(other.logits.double()), batch)
        torch.testing.assert_close(apart.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(SparseKDLoss(k)(student, other, batch), apart)
    torch.testing.assert_close(CrossEntropyLoss()(same, same, batch).double(), -right.mean())


@pytest.mark.parametrize("k", [5, V])
def test_what_does_not_count_reaches_neither_value_nor_gradient(k: int) -> None:
    logits, _, labels, _ = given(torch.float32)
    ids = logits.topk(k).indices
    counts = torch.arange(B * L) % 4 != 1
    noisy = torch.where(counts[:, None], logits, torch.nan).requires_grad_()
    found, right = merged(noisy, ids, labels.where(counts, IGNORE), counts)
    assert right is not None
    (found.square().sum() + right.sum()).backward()
    assert noisy.grad is not None
    assert not noisy.grad[~counts].any()
    assert noisy.grad[counts].any()
    equal = -math.log(min(k + 1, V))
    rest = torch.cat([found[~counts].flatten(), right[~counts]])
    torch.testing.assert_close(rest, torch.full_like(rest, equal))
    alone, _ = merged(logits[counts], ids[counts])
    torch.testing.assert_close(found[counts], alone, rtol=0, atol=0)


@pytest.mark.parametrize("drawn", [False, True])
def test_cross_entropy_and_divergence_of_one_pass_are_those_of_two(drawn: bool) -> None:
    logits, above = normal(B, L, V).float(), normal(B, L, V, seed=3).float()
    teacher = SparseLogits.of(above, 6)
    if drawn:
        total = above.logsumexp(-1, keepdim=True)
        teacher = teacher._replace(values=teacher.values - total, rest=torch.full((B, L), -4.0), drawn=True)
    keep = torch.rand(B, L, generator=torch.Generator().manual_seed(0)) < 0.7
    labels = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1))
    batch: Batch = {"labels": labels.where(keep, IGNORE), "keep": keep}
    objective = Objective({"ce": CrossEntropyLoss(), "kd": SparseKDLoss(6)}, {"ce": 0.3, "kd": 0.7})
    results = []
    for apart in (False, True):
        z = logits.where(keep[..., None], torch.nan).requires_grad_()
        loss, parts = objective(ModelOutput(z), ModelOutput(above[..., :0], sparse=teacher), batch, apart=apart)
        loss.backward()
        assert z.grad is not None
        results.append((loss.detach(), parts["ce"].detach(), parts["kd"].detach(), z.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert float(results[0][1]) != pytest.approx(float(results[0][2]))
