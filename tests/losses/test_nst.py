from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kd_lightning.losses.nst import Kernel, NSTLoss, nst
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MAPS = randn(4, 3, 2, 2, seed=1), randn(4, 5, 2, 2, seed=2)
TOKENS = randn(4, 5, 3, seed=1), randn(4, 5, 6, seed=2)
PADDED = torch.arange(20).view(4, 5) % 7 != 1
CASES = [
    Case("polynomial", nst, (MAPS[0], randn(4, 3, 2, 2, seed=2)), {}),
    Case("linear", nst, (MAPS[0], randn(4, 3, 2, 2, seed=2)), {"kernel": "linear"}),
    Case("maps of another size and width", nst, (randn(4, 3, 4, 4), MAPS[1]), {}),
    Case("tokens", nst, TOKENS, {}, mask=PADDED),
    Case("tokens, linear", nst, (TOKENS[0], randn(4, 5, 3, seed=2)), {"kernel": "linear"}, mask=PADDED),
]  # the Gaussian kernel's width has no gradient, so that finite differences are not its gradient: see below


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def discrepancy(student: np.ndarray, teacher: np.ndarray, kernel: str) -> float:
    """The squared MMD of one example, from `(channels, places)`, with an explicit double loop."""
    s, t = ([row / math.sqrt((row**2).sum()) for row in side] for side in (student, teacher))
    width = np.mean([((a - b) ** 2).sum() for a in s for b in t])
    k: Callable[[np.ndarray, np.ndarray], float] = {
        "linear": lambda a, b: (a * b).sum(),
        "polynomial": lambda a, b: (a * b).sum() ** 2,
        "gaussian": lambda a, b: math.exp(-((a - b) ** 2).sum() / (2 * width)),
    }[kernel]
    of_t, of_s, across = (np.mean([k(a, b) for a in x for b in y]) for x, y in ((t, t), (s, s), (s, t)))
    return float(of_t + of_s - 2 * across)


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_value_by_numpy(kernel: Kernel) -> None:
    student, teacher = MAPS[0].numpy().reshape(4, 3, 4), MAPS[1].numpy().reshape(4, 5, 4)
    expected = [discrepancy(s, t, kernel) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(nst(*MAPS, kernel, reduction="none"), expected, rtol=1e-10)
    assert nst(*MAPS, kernel).item() == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_tokens_by_numpy(kernel: Kernel) -> None:
    student, teacher = (x.numpy().transpose(0, 2, 1) for x in TOKENS)
    mask = PADDED.clone()
    mask[2] = False  # an example without any token counts neither in the sum nor in the mean
    expected = [discrepancy(student[b][:, mask[b]], teacher[b][:, mask[b]], kernel) for b in (0, 1, 3)]
    assert nst(*TOKENS, kernel, mask).item() == pytest.approx(np.mean(expected))


def test_the_linear_kernel_is_the_distance_of_mean_patterns() -> None:
    means = [(x.flatten(2) / x.flatten(2).norm(dim=2, keepdim=True)).mean(1) for x in MAPS]
    expected = (means[0] - means[1]).square().sum(1).mean()
    torch.testing.assert_close(nst(*MAPS, "linear"), expected)


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_it_is_the_channels_distribution_that_counts(kernel: Kernel) -> None:
    value = nst(*MAPS, kernel)
    torch.testing.assert_close(nst(MAPS[0][:, [2, 0, 1]], MAPS[1], kernel), value)
    torch.testing.assert_close(nst(MAPS[0].repeat(1, 2, 1, 1), MAPS[1], kernel), value)
    lengths = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64).view(3, 1, 1)
    torch.testing.assert_close(nst(MAPS[0] * lengths, MAPS[1], kernel), value)
    torch.testing.assert_close(nst(MAPS[0].flip(3), MAPS[1].flip(3), kernel), value)
    assert nst(MAPS[0].flip(3), MAPS[1], kernel).item() != pytest.approx(value.item(), rel=1e-3)


def test_the_polynomial_kernel_does_not_see_signs() -> None:
    assert nst(-MAPS[0], MAPS[0]).item() == pytest.approx(0.0, abs=1e-12)
    assert nst(-MAPS[0], MAPS[0], "linear").item() > 0.1


def test_the_gaussian_kernel() -> None:
    assert nst(MAPS[0], MAPS[0], "gaussian").item() == pytest.approx(0.0, abs=1e-12)
    student = MAPS[0].clone().requires_grad_()
    value = nst(student, MAPS[1].clone().requires_grad_(), "gaussian")
    (gradient,) = torch.autograd.grad(value, student)
    assert nst(student.detach() - 1e-4 * gradient / gradient.norm(), MAPS[1], "gaussian") < value
    same = torch.ones(2, 1, 2, 2, requires_grad=True)  # one channel on each side, and the same: no width at all
    value = nst(same, torch.ones(2, 1, 2, 2), "gaussian")
    value.backward()
    assert value.item() == 0.0
    assert same.grad is not None
    assert (same.grad == 0).all()


@pytest.mark.parametrize("kernel", ["polynomial", "linear", "gaussian"])
def test_silent_channels_get_no_gradient(kernel: Kernel) -> None:
    student = MAPS[0].clone()
    student[:, 1] = 0.0
    student.requires_grad_()
    value = nst(student, MAPS[1], kernel)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert (student.grad[:, 1] == 0).all()
    assert torch.isfinite(student.grad).all()


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student feature \(4, 5, 3\) and teacher feature \(4, 3, 6\) must be two"):
        nst(TOKENS[0], TOKENS[1][:, :3])
    with pytest.raises(ValueError, match=r"student feature \(4, 3, 2, 2\) and teacher feature \(4, 5, 6\)"):
        nst(MAPS[0], TOKENS[1])
    with pytest.raises(ValueError, match=r"feature \(4, 3\): expected a map"):
        nst(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="kernel='rbf': expected one of polynomial, linear, gaussian"):
        nst(*MAPS, "rbf")  # type: ignore[arg-type]


def test_the_term_compares_the_last_maps() -> None:
    term = NSTLoss(layers=[(-1, -1)], kernel="linear")
    term.plan(lambda kind: {"feature_maps": 3}[kind], lambda kind: {"feature_maps": 4}[kind])
    assert (term.needs_student, term.needs_teacher) == (("feature_maps[2]",), ("feature_maps[3]",))
    student = ModelOutput(torch.zeros(4, 2), {"feature_maps[2]": MAPS[0]})
    teacher = ModelOutput(torch.zeros(4, 2), {"feature_maps[3]": MAPS[1]})
    torch.testing.assert_close(term(student, teacher, {}), nst(*MAPS, "linear"))


def test_padding_does_not_reach_the_term() -> None:
    term = NSTLoss("hidden")
    term.plan(lambda kind: {"hidden": 1}[kind], lambda kind: {"hidden": 2}[kind])
    assert (term.needs_student, term.needs_teacher) == (("hidden[1]",), ("hidden[2]",))
    logits = torch.zeros(4, 2)

    def value(padding: float) -> torch.Tensor:
        noise = padding * (~PADDED).double().unsqueeze(2)
        student = ModelOutput(logits, {"hidden[1]": TOKENS[0] + noise})
        teacher = ModelOutput(logits, {"hidden[2]": TOKENS[1] - noise})
        return term(student, teacher, {"attention_mask": PADDED.long()})

    torch.testing.assert_close(value(50.0), value(0.0))
    torch.testing.assert_close(value(0.0), nst(*TOKENS, mask=PADDED))
