from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from kd_lightning.losses.factor_transfer import FactorTransferLoss, factor_transfer
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

FACTORS = randn(4, 3, 2, 2, seed=1), randn(4, 3, 2, 2, seed=2)
CASES = [Case("factor_transfer", factor_transfer, FACTORS, {}, near=False)]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_value_by_numpy() -> None:
    flat = [x.numpy().reshape(4, -1) for x in FACTORS]
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in flat)
    np.testing.assert_allclose(factor_transfer(*FACTORS, "none"), np.abs(s - t).sum(1), rtol=1e-12)


def test_scale_does_not_matter_and_the_bound_is_met() -> None:
    torch.testing.assert_close(factor_transfer(3 * FACTORS[0], FACTORS[1]), factor_transfer(*FACTORS))
    flat = torch.ones(2, 9, dtype=torch.float64)
    assert factor_transfer(-flat, flat).item() == pytest.approx(2 * math.sqrt(9))


def test_shapes_and_ranges() -> None:
    with pytest.raises(ValueError, match=r"student factor \(2, 3\) and teacher factor \(2, 4\)"):
        factor_transfer(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"rate=0 must be in \(0, 1\]"):
        FactorTransferLoss(rate=0)
    with pytest.raises(ValueError, match=r"pretrain=1.5 must be in \(0, 1\]"):
        FactorTransferLoss(pretrain=1.5)
    vectors = ModelOutput(torch.zeros(2, 2), {"feature_maps[-1]": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"of the student is \(2, 3\) .* both must be maps"):
        FactorTransferLoss().connect(vectors, vectors, 10)


def connected(**options: float) -> tuple[FactorTransferLoss, ModelOutput, ModelOutput]:
    torch.manual_seed(0)
    student = ModelOutput(torch.zeros(4, 2), {"feature_maps[-1]": randn(4, 3, 4, 4).float().requires_grad_()})
    teacher = ModelOutput(torch.zeros(4, 2), {"feature_maps[-1]": randn(4, 6, 8, 8, seed=1).float().requires_grad_()})
    term = FactorTransferLoss(**options)
    term.connect(student, teacher, 10)
    return term, student, teacher


def gradients(term: FactorTransferLoss) -> dict[str, bool]:
    """Say which of the three parts got a gradient in all of its parameters, or in none."""
    found = {}
    for name in ("paraphraser", "reconstruction", "translator"):
        reached = {p.grad is not None and bool(p.grad.abs().sum() > 0) for p in getattr(term, name).parameters()}
        assert len(reached) == 1, f"{name} is reached in part"
        found[name] = reached.pop()
    return found


def test_at_first_the_reconstruction_trains_the_paraphraser_and_the_distance_the_student() -> None:
    term, student, teacher = connected(rate=0.5, pretrain=0.4)
    map_s, map_t = student.features["feature_maps[-1]"], teacher.features["feature_maps[-1]"]
    value = term(student, teacher, {})
    value.backward()
    assert gradients(term) == {"paraphraser": True, "reconstruction": True, "translator": True}
    assert map_s.grad is not None
    assert map_t.grad is None
    small = torch.nn.functional.avg_pool2d(map_t, 2)
    factor = term.paraphraser(small)
    assert factor.shape == (4, 3, 4, 4)
    error = (term.reconstruction(factor) - small).square().mean()
    torch.testing.assert_close(value, error + factor_transfer(term.translator(map_s), factor))

    reached = [p.grad.clone() for p in term.paraphraser.parameters() if p.grad is not None]
    term.zero_grad()
    (term.reconstruction(term.paraphraser(small.detach())) - small.detach()).square().mean().backward()
    for p, gradient in zip(term.paraphraser.parameters(), reached, strict=True):
        torch.testing.assert_close(p.grad, gradient)  # nothing of the distance is in it


def test_later_the_paraphraser_stays_as_it_is() -> None:
    term, student, teacher = connected(pretrain=0.4)
    optimizer = torch.optim.AdamW(term.parameters(), lr=0.1, weight_decay=0.1)
    for progress in (0.0, 0.2):
        term.progress = progress
        term(student, teacher, {}).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(term.state_dict())
    term.train()
    term.progress = 0.4
    for _ in range(2):
        term(student, teacher, {}).backward()
        assert gradients(term) == {"paraphraser": False, "reconstruction": False, "translator": True}
        optimizer.step()
        optimizer.zero_grad()
    for name, value in term.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("translator")), name


def test_the_paraphraser_learns_to_reconstruct() -> None:
    term, student, teacher = connected(rate=1.0, pretrain=1.0)
    small = torch.nn.functional.avg_pool2d(teacher.features["feature_maps[-1]"], 2).detach()

    def error() -> Any:
        return (term.reconstruction(term.paraphraser(small)) - small).square().mean().item()

    first = error()
    optimizer = torch.optim.Adam(term.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        term(student, teacher, {}).backward()
        optimizer.step()
    assert error() < 0.5 * first
