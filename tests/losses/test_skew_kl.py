from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from kd_lightning.losses.generalized_jsd import generalized_jsd
from kd_lightning.losses.reverse_kl import reverse_kl
from kd_lightning.losses.skew_kl import SkewKLLoss, skew_kl
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1, scale=2.0), randn(6, 4, seed=2, scale=2.0)
CASES = [
    *(
        Case(f"{direction} {skew}", skew_kl, (STUDENT, TEACHER),
             {"temperature": 2.0, "skew": skew, "direction": direction}, mask=torch.arange(6) % 2 == 0)
        for direction in ("forward", "reverse") for skew in (0.0, 0.1)
    ),
    Case(
        "tokens", skew_kl, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_value_by_scipy(skew: float, temperature: float) -> None:
    p_s, p_t = (softmax(z.numpy() / temperature, axis=-1) for z in (STUDENT, TEACHER))
    for direction, p, q in (("forward", p_t, p_s), ("reverse", p_s, p_t)):
        expected = temperature**2 * entropy(p, skew * p + (1 - skew) * q, axis=-1)
        options: dict[str, Any] = {"temperature": temperature, "skew": skew, "direction": direction}
        np.testing.assert_allclose(skew_kl(STUDENT, TEACHER, **options, reduction="none"), expected, rtol=1e-9)
        assert skew_kl(STUDENT, TEACHER, **options).item() == pytest.approx(expected.mean())
        assert skew_kl(STUDENT, TEACHER, **options, reduction="sum").item() == pytest.approx(expected.sum())


def test_without_skew_it_is_the_plain_divergence() -> None:
    torch.testing.assert_close(skew_kl(STUDENT, TEACHER, 2.0, 0.0), soft_target(STUDENT, TEACHER, 2.0))
    torch.testing.assert_close(skew_kl(STUDENT, TEACHER, 2.0, 0.0, "reverse"), reverse_kl(STUDENT, TEACHER, 2.0))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_it_is_bounded(direction: Any) -> None:
    values = skew_kl(100 * STUDENT, 100 * TEACHER, 3.0, 0.1, direction, reduction="none")
    assert (values <= -9.0 * math.log(0.1) + 1e-12).all()
    assert values.max().item() == pytest.approx(-9.0 * math.log(0.1), rel=1e-6)  # attained where the sides are disjoint


def test_its_two_directions_make_up_the_jensen_shannon_divergence() -> None:
    beta = 0.3
    parts = beta * skew_kl(STUDENT, TEACHER, 2.0, beta) + (1 - beta) * skew_kl(
        STUDENT, TEACHER, 2.0, 1 - beta, "reverse"
    )
    torch.testing.assert_close(parts, generalized_jsd(STUDENT, TEACHER, 2.0, beta))


@pytest.mark.parametrize("skew", [-0.1, 1.0, math.nan])
def test_refuses_a_skew_out_of_range(skew: float) -> None:
    with pytest.raises(ValueError, match=r"skew must be in \[0, 1\)"):
        skew_kl(STUDENT, TEACHER, skew=skew)


def test_refuses_an_unknown_direction() -> None:
    with pytest.raises(ValueError, match="direction must be forward or reverse, got 'sideways'"):
        skew_kl(STUDENT, TEACHER, direction="sideways")  # type: ignore[arg-type]


def test_the_term_passes_its_options_on() -> None:
    value = SkewKLLoss(2.0, skew=0.3, direction="reverse")(ModelOutput(STUDENT), ModelOutput(TEACHER), {})
    torch.testing.assert_close(value, skew_kl(STUDENT, TEACHER, 2.0, 0.3, "reverse"))
