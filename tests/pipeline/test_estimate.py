"""How long a run is said to take, before it and while it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.pipeline import estimate as module
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.estimate import estimate
from kd_lightning.pipeline.preflight import preflight
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.stages import plan
from kd_lightning.runtime import clock
from kd_lightning.runtime.clock import Clock
from tests.conftest import tiny_overrides

Composed = Callable[..., DictConfig]


def test_the_time_left_goes_by_the_pace_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 140.0])
    monkeypatch.setattr(clock.time, "monotonic", lambda: next(now))
    found = Clock({"teacher": 10.0, "seed_0/baseline": 20.0, "report": 5.0}, begun=80.0)
    assert found.total == 35
    assert found.left("teacher") == 2 * 25  # 20 seconds for what was to take 10
    assert found.left("seed_0/baseline") == 2 * 5


def test_every_stage_is_timed_and_the_line_says_what_is_done(
    composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = StringIO()
    overrides = [
        *tiny_overrides(toy_csv, tmp_path / "run"),
        "stages=[teacher,baseline,distill,finetune]",
        "data.views=1",
    ]
    run = Run(composed(*overrides), Console(file=output, width=200))
    stages = plan(run)
    trials = preflight(run, stages)
    assert {trial.stage.kind for trial in trials} == {"teacher", "baseline", "distill"}
    assert estimate(run, stages, trials) is None, "a run of few steps is not estimated"
    monkeypatch.setattr(module, "LEAST", 1)
    found = estimate(run, stages, trials)
    assert found is not None
    assert found.parts.keys() == {stage.path for stage in stages} | {"report"}
    assert all(seconds > 0 for seconds in found.parts.values())
    assert 0 < found.outputs < found.parts["seed_0/distill"]
    [line] = [line for line in output.getvalue().splitlines() if line.startswith("about")]
    assert re.fullmatch(
        r"about .* \(budget=standard\): teacher of 36 steps .*, its outputs for 408 examples .*, "
        r"3 students of 11 to 22 steps .*",
        line,
    )


def test_what_is_finished_is_not_counted(
    composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST", 1)
    overrides = tiny_overrides(toy_csv, tmp_path / "run")
    train_all(Run(composed(*overrides, "stages=[teacher]"), Console(quiet=True)))
    output = StringIO()
    train_all(Run(composed(*overrides), Console(file=output, width=200)))
    lines = [line for line in output.getvalue().splitlines() if line.startswith("about")]
    assert len(lines) == 3  # before, and after each of two students
    assert "teacher of" not in lines[0]
    assert "2 students of 22 steps" in lines[0]


def test_outputs_that_are_cached_are_not_counted(
    composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST", 1)
    overrides = tiny_overrides(toy_csv, tmp_path / "run")
    train_all(Run(composed(*overrides, "stages=[teacher,distill]"), Console(quiet=True)))
    again = [*tiny_overrides(toy_csv, tmp_path / "again"), f"teacher.checkpoint={tmp_path / 'run'}", "stages=[distill]"]
    for more, expected in ((["seed=1"], False), (["seed=1", "teacher.cache=refresh"], True)):
        output = StringIO()
        run = Run(composed(*again, *more), Console(file=output, width=200))
        stages = plan(run)
        found = estimate(run, stages, preflight(run, stages))
        assert found is not None
        assert (found.outputs > 0) is expected
        assert ("its outputs for" in output.getvalue()) is expected
