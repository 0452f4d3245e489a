from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kd_lightning.losses.vid import VIDLoss, vid
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

VARIANCE = {width: torch.linspace(0.5, 3.0, width) for width in (3, 4, 5)}
CASES = [  # a log-likelihood has no zero
    Case("vectors", vid, (randn(6, 4, seed=1), randn(6, 4, seed=2)), {"variance": VARIANCE[4]},
         torch.arange(6) % 2 == 0, zero=False),
    Case("tokens", vid, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {"variance": VARIANCE[5]},
         torch.arange(12).view(4, 3) % 5 != 1, zero=False),
    Case("maps", vid, (randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)), {"variance": VARIANCE[3]},
         torch.arange(4) != 1, zero=False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_scipy() -> None:
    mean, teacher = randn(6, 4, seed=1), randn(6, 4, seed=2)
    variance = torch.linspace(0.5, 3.0, 4, dtype=torch.float64)
    expected = -norm.logpdf(teacher.numpy(), mean.numpy(), np.sqrt(variance.numpy())) - math.log(2 * math.pi) / 2
    np.testing.assert_allclose(vid(mean, teacher, variance, reduction="none"), expected.mean(1), rtol=1e-12)
    maps = mean.T.reshape(1, 4, 2, 3), teacher.T.reshape(1, 4, 2, 3)  # the same numbers as places of one map
    assert vid(*maps, variance).item() == pytest.approx(expected.mean())


def test_the_best_variance_is_the_mean_squared_error() -> None:
    mean, teacher = randn(50, 3, seed=1), randn(50, 3, seed=2)
    variance = (mean - teacher).square().mean(0).requires_grad_()
    vid(mean, teacher, variance).backward()
    assert variance.grad is not None
    torch.testing.assert_close(variance.grad, torch.zeros_like(variance), atol=1e-12, rtol=0)
    assert vid(mean, teacher, variance).item() == pytest.approx(0.5 * (1 + variance.log().mean().item()))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"student feature \(2, 3\) and teacher feature \(2, 4\)"):
        vid(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match=r"variance \(4,\) must have one entry for each of 3 channels"):
        vid(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"mask \(3,\) must have the shape \(2,\)"):
        vid(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"variance=0.5 must be above floor=0.5"):
        VIDLoss(variance=0.5, floor=0.5)
    with pytest.raises(ValueError, match="floor must be a positive number, got 0"):
        VIDLoss(floor=0.0)


def output(feature: str, *shape: int, seed: int = 0) -> ModelOutput:
    return ModelOutput(torch.zeros(shape[0], 2), {feature: randn(*shape, seed=seed).float()})


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 6, 2, 2)])
def test_the_term_learns_variances_and_a_regressor(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    narrow = tuple(5 if size == 6 else size for size in shape)
    student, teacher = output("x", *narrow), output("y", *shape, seed=1)
    term = VIDLoss("x", "y", variance=2.0, floor=0.5)
    assert (term.needs_student, term.needs_teacher) == (("x",), ("y",))
    with pytest.raises(ValueError, match="VIDLoss: the projector is not built"):
        term(student, teacher, {})
    term.connect(student, teacher, 10)
    torch.testing.assert_close(term.variance, torch.full((6,), 2.0))
    value = term(student, teacher, {})
    value.backward()
    assert isinstance(term.projector, torch.nn.Module)
    torch.testing.assert_close(
        value, vid(term.projector(student.features["x"]), teacher.features["y"], torch.full((6,), 2.0))
    )
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    with torch.no_grad():
        term.raw_variance.fill_(-100.0)
    torch.testing.assert_close(term.variance, torch.full((6,), 0.5))


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    student, teacher = output("x", 2, 3, 4), output("x", 2, 3, 4, seed=1)
    term = VIDLoss("x", "x")
    term.connect(student, teacher, 10)
    value = term(student, teacher, {"attention_mask": mask})
    longer = [ModelOutput(x.logits, {"x": torch.cat([x.features["x"], torch.full((2, 2, 4), 9.0)], 1)})
              for x in (student, teacher)]  # fmt: skip
    padded = torch.cat([mask, torch.zeros(2, 2, dtype=torch.int64)], 1)
    torch.testing.assert_close(term(*longer, {"attention_mask": padded}), value)
