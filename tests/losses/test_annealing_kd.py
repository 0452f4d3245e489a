from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_lightning.losses.annealing_kd import AnnealingKDLoss, annealing_kd
from kd_lightning.losses.logit_mse import logit_mse
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.schedules import Step
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

CASES = [
    Case(
        "annealing_kd", annealing_kd, (randn(6, 4, seed=1), randn(6, 4, seed=2)), {"temperature": 4},
        mask=torch.arange(6) % 2 == 0,
        zero=False,  # the student is to have the teacher's logits times a factor below 1
    ),
    Case(
        "annealing_kd at T = 1", annealing_kd, (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)), {"temperature": 1},
        mask=torch.arange(12).view(4, 3) % 5 != 1,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


@pytest.mark.parametrize("temperature", [1, 3, 10])
def test_value_by_numpy(temperature: int) -> None:
    student, teacher = randn(6, 4, seed=1), randn(6, 4, seed=2)
    factor = {1: 1.0, 3: 0.8, 10: 0.1}[temperature]
    expected = ((student.numpy() - factor * teacher.numpy()) ** 2).mean(1)
    found = annealing_kd(student, teacher, temperature, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_the_last_temperature_is_matching_logits_and_a_scaled_teacher_is_matched_at_its_factor() -> None:
    student, teacher = randn(6, 4, seed=1), randn(6, 4, seed=2)
    torch.testing.assert_close(annealing_kd(student, teacher, 1), logit_mse(student, teacher))
    assert annealing_kd(0.4 * teacher, teacher, 4, max_temperature=5).item() == pytest.approx(0.0, abs=1e-12)


def test_the_temperature_falls_by_one_in_equal_parts_of_the_phase_and_stays_one_after_it() -> None:
    term = AnnealingKDLoss(max_temperature=5, until=0.5)
    seen = []
    for progress in (0.0, 0.05, 0.11, 0.21, 0.31, 0.45, 0.5, 0.8, 1.0):
        term.progress = progress
        seen.append(term.temperature)
    assert seen == [5, 5, 4, 3, 2, 1, 1, 1, 1]
    assert term.settings() == {"temperature": 1}
    term.progress = 0.0
    output = [ModelOutput(randn(2, 3, seed=seed)) for seed in (1, 2)]
    torch.testing.assert_close(term(*output, {}), annealing_kd(output[0].logits, output[1].logits, 5, 5))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\)"):
        annealing_kd(torch.zeros(2, 3), torch.zeros(2, 4))
    for temperature in (0, 11):
        with pytest.raises(ValueError, match=rf"temperature={temperature} must be between 1 and max_temperature=10"):
            annealing_kd(torch.zeros(2, 3), torch.zeros(2, 3), temperature)
    with pytest.raises(ValueError, match=r"max_temperature=0\.5 must be a whole number"):
        AnnealingKDLoss(max_temperature=0.5)  # type: ignore[arg-type]
    for until in (0.0, 1.0):  # as a boundary of the schedule that begins the second phase
        with pytest.raises(ValueError, match=rf"until={until} must be a share of the training inside \(0, 1\)"):
            AnnealingKDLoss(until=until)
        with pytest.raises(ConfigError, match=r"inside \(0, 1\)"):
            Step([1.0, 0.0], [until])
