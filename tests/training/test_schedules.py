from __future__ import annotations

import pickle

import numpy as np
import pytest

from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.schedules import Cosine, Linear, OneMinus, Step, Times


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 8.0), (0.125, 6.0), (0.25, 4.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0)]
)
def test_linear(progress: float, value: float) -> None:
    assert Linear(start=8.0, end=0.0, until=0.5)(progress) == pytest.approx(value)


def test_linear_may_rise_and_takes_the_whole_training_unless_told() -> None:
    assert [Linear(start=0.1, end=0.9)(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.1, 0.3, 0.9])


@pytest.mark.parametrize(
    ("progress", "value"),
    [(0.0, 5.0), (0.2, 1 + 4 * np.cos(np.pi / 8) ** 2), (0.4, 3.0), (0.8, 1.0), (0.9, 1.0), (1.0, 1.0)],
)
def test_cosine(progress: float, value: float) -> None:
    # half a wave; at a quarter of the way it is end + (start - end) cos^2(pi/8), by the half-angle formula
    assert Cosine(start=5.0, end=1.0, until=0.8)(progress) == pytest.approx(value)


def test_step_changes_at_its_boundaries() -> None:
    step = Step(values=[8.0, 4.0, 1.0], boundaries=[0.5, 0.9])
    assert [step(p) for p in (0.0, 0.49, 0.5, 0.89, 0.9, 1.0)] == [8.0, 8.0, 4.0, 4.0, 1.0, 1.0]
    assert Step(values=[3.0], boundaries=[])(0.7) == 3.0


@pytest.mark.parametrize("schedule", [Linear(0.2, 0.8), Cosine(0.2, 0.8), Step([0.2, 0.8], [0.5])])
def test_one_minus_adds_up_to_one(schedule: Linear | Cosine | Step) -> None:
    rest = OneMinus(schedule)
    for progress in (0.0, 0.3, 0.5, 1.0):
        assert rest(progress) + schedule(progress) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", [Linear(1, 2), Cosine(1, 2), Step([1, 2], [0.5]), OneMinus(Linear(0, 1))])
def test_schedules_can_be_sent_to_another_process(schedule: Linear) -> None:
    assert pickle.loads(pickle.dumps(schedule))(0.7) == schedule(0.7)


@pytest.mark.parametrize("schedule", [Linear, Cosine])
@pytest.mark.parametrize("until", [0.0, -0.5, 1.1, float("nan")])
def test_refuses_an_end_outside_the_training(schedule: type[Linear], until: float) -> None:
    with pytest.raises(ConfigError, match=r"until is a share of the training in \(0, 1\]"):
        schedule(1.0, 0.0, until=until)


def test_refuses_values_that_do_not_fit_their_boundaries() -> None:
    with pytest.raises(ConfigError, match="2 values and 2 boundaries"):
        Step(values=[1.0, 2.0], boundaries=[0.3, 0.6])


@pytest.mark.parametrize("boundaries", [[0.6, 0.3], [0.0, 0.5], [0.5, 1.0], [10.0, 20.0]])
def test_refuses_boundaries_that_do_not_rise_inside_the_training(boundaries: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"must rise inside \(0, 1\)"):
        Step(values=[1.0, 2.0, 3.0], boundaries=boundaries)


def test_a_schedule_times_a_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="Times: its factor is a schedule"):
        Times(Linear(0.0, 1.0), Linear(1.0, 0.0))  # type: ignore[arg-type]
