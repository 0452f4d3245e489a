from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from kd_lightning.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title


def without_teacher(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return cross_entropy(student, labels, **options)


class OfLabels(Case):
    def reads(self, side: int) -> Tensor:
        return torch.full_like(self.tensors[side], side == 0, dtype=torch.bool)


CASES = [
    OfLabels("cross_entropy", without_teacher, (randn(6, 4, seed=1), randn(6, 4), torch.arange(6) % 4), {},
             mask=torch.arange(6) % 2 == 0, zero=False),
    OfLabels("tokens", without_teacher, (randn(4, 3, 5, seed=1), randn(4, 3, 5), torch.arange(12).view(4, 3) % 5),
             {"label_smoothing": 0.1}, mask=torch.arange(12).view(4, 3) % 5 != 1, zero=False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Logits `(12, 5)` float64 and labels, every third one missing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (12,), generator=generator)
    labels[::3] = IGNORE
    return 3 * torch.randn(12, 5, generator=generator, dtype=torch.float64), labels


def targets(labels: np.ndarray, classes: int, smoothing: float) -> np.ndarray:
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


def by_numpy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> np.ndarray:
    """One value for each labelled example."""
    known = (labels != IGNORE).numpy()
    q = targets(labels.numpy()[known], logits.shape[-1], smoothing)
    return np.asarray(-(q * log_softmax(logits.numpy()[known], axis=-1)).sum(-1))


def loss(logits: Tensor, labels: Tensor, **options: bool) -> Tensor:
    entries: Batch = {"labels": labels}
    value: Tensor = CrossEntropyLoss(**options)(ModelOutput(logits), ModelOutput(logits), entries)  # type: ignore[arg-type]
    return value


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_value_in_numpy(batch: tuple[Tensor, Tensor], smoothing: float) -> None:
    expected = by_numpy(*batch, smoothing)
    assert cross_entropy(*batch, smoothing).item() == pytest.approx(expected.mean(), rel=1e-10)
    assert cross_entropy(*batch, smoothing, reduction="sum").item() == pytest.approx(expected.sum(), rel=1e-10)
    each = cross_entropy(*batch, smoothing, reduction="none")
    assert each.shape == batch[1].shape
    np.testing.assert_allclose(each[batch[1] != IGNORE].numpy(), expected, rtol=1e-10)
    assert (each[batch[1] == IGNORE] == 0).all()


def test_zero_when_certain_and_right() -> None:
    logits = torch.tensor([[0.0, 200.0], [200.0, 0.0]])
    assert cross_entropy(logits, torch.tensor([1, 0])).item() == 0.0
    assert cross_entropy(logits, torch.tensor([0, 1])).item() == pytest.approx(200.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_is_probabilities_less_targets(batch: tuple[Tensor, Tensor], smoothing: float) -> None:
    logits, labels = batch[0].clone().requires_grad_(), batch[1]
    cross_entropy(logits, labels, smoothing).backward()
    known = (labels != IGNORE).numpy()
    expected = np.zeros(logits.shape)
    p = softmax(batch[0].numpy()[known], axis=-1)
    expected[known] = (p - targets(labels.numpy()[known], 5, smoothing)) / known.sum()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_gradcheck(batch: tuple[Tensor, Tensor]) -> None:
    logits = batch[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, batch[1], 0.1), (logits,))


def test_what_unlabelled_examples_say_changes_nothing(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    other = torch.where((labels == IGNORE)[:, None], 1e6, logits)
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(other, labels))
    known = labels != IGNORE
    torch.testing.assert_close(cross_entropy(logits[known], labels[known]), cross_entropy(logits, labels))


def test_a_batch_without_labels_is_a_zero_with_a_graph(batch: tuple[Tensor, Tensor]) -> None:
    logits = batch[0].requires_grad_()
    value = loss(logits, torch.full((12,), IGNORE))
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_microbatches_weighted_by_labels_equal_the_whole(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    parts = [slice(0, 1), slice(1, 6), slice(6, 12)]  # the first has no label at all
    means = torch.stack([cross_entropy(logits[s], labels[s]) for s in parts])
    counts = torch.stack([(labels[s] != IGNORE).sum() for s in parts])
    torch.testing.assert_close((means * counts).sum() / counts.sum(), cross_entropy(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    logits = (3e3 * batch[0]).to(dtype).requires_grad_()
    assert logits.abs().max() > 1e4
    value = cross_entropy(logits, batch[1])
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(value, cross_entropy(logits.float(), batch[1]))
    assert value.item() == pytest.approx(by_numpy(logits.detach().double(), batch[1]).mean(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_autocast_does_not_reach_it(
    batch: tuple[Tensor, Tensor], smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, plain = [], torch.nn.functional.cross_entropy

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    with torch.autocast("cpu", torch.bfloat16):
        value = cross_entropy(batch[0].float(), batch[1], smoothing)
        assert torch.is_autocast_enabled("cpu")
    assert inside == [False]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(by_numpy(*batch, smoothing).mean(), rel=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager(batch: tuple[Tensor, Tensor]) -> None:
    results = []
    for function in (cross_entropy, torch.compile(cross_entropy, fullgraph=True)):
        logits = batch[0].float().clone().requires_grad_()
        value = function(logits, batch[1], 0.1)
        value.backward()
        results.append((value.detach(), logits.grad))
    torch.testing.assert_close(results[1], results[0])


def test_tokens_are_averaged_over_labelled_positions(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch[0].view(3, 4, 5), batch[1].view(3, 4)
    expected = by_numpy(*batch).mean()
    assert cross_entropy(logits, labels).item() == pytest.approx(expected)
    more = torch.cat([logits, torch.full((3, 2, 5), 7.0)], 1), torch.cat([labels, torch.full((3, 2), IGNORE)], 1)
    assert cross_entropy(*more).item() == pytest.approx(expected)  # padding
    assert cross_entropy(logits, labels, reduction="none").shape == (3, 4)


def test_a_mask_leaves_out_what_has_a_label(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch[0].view(3, 4, 5).clone().requires_grad_(), batch[1].view(3, 4)
    mask = torch.arange(12).view(3, 4) % 4 != 1
    counts = mask & (labels != IGNORE)
    assert counts.sum() < (labels != IGNORE).sum()
    value = cross_entropy(logits, labels, 0.1, mask)
    assert value.item() == pytest.approx(by_numpy(logits.detach()[counts], labels[counts], 0.1).mean(), rel=1e-10)
    value.backward()
    assert logits.grad is not None
    assert torch.equal((logits.grad != 0).any(-1), counts)
    nothing = cross_entropy(logits, labels, mask=torch.zeros_like(mask))
    assert nothing.item() == 0.0
    assert nothing.requires_grad
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(3, 4\)"):
        cross_entropy(logits, labels, mask=mask[:, 0])


def test_the_term_smooths_and_needs_no_teacher(batch: tuple[Tensor, Tensor]) -> None:
    term = CrossEntropyLoss(label_smoothing=0.3)
    value = term(ModelOutput(batch[0]), ModelOutput(torch.zeros(0)), {"labels": batch[1]})
    assert value.item() == pytest.approx(by_numpy(*batch, 0.3).mean())
    assert not term.uses_teacher


def test_refuses_labels_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"labels \(3,\) must have the shape \(2,\) of the logits"):
        cross_entropy(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels \(2,\) must have the shape \(2, 3\)"):
        cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 1.5, float("nan")])
def test_refuses_smoothing_outside_its_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        cross_entropy(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_student_without_logits_learns_the_same(smoothing: float) -> None:
    hidden, head, bias = (x.requires_grad_() for x in (randn(2, 5, 3, seed=1), randn(7, 3, seed=2), randn(7, seed=3)))
    labels = torch.tensor([[1, 2, -100, 4, 0], [6, 5, 4, 3, 2]])
    batch = {"labels": labels, "keep": torch.tensor([[True, True, True, False, True], [True] * 5])}
    features = {"last_hidden": hidden, "head": head, "head_bias": bias}
    term = CrossEntropyLoss(smoothing)
    values = [
        term(output, output, batch)
        for output in (ModelOutput(hidden @ head.T + bias), ModelOutput(hidden[..., :0], features))
    ]
    torch.testing.assert_close(values[1], values[0])
    found, expected = (torch.autograd.grad(value, [hidden, head, bias]) for value in values[::-1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
