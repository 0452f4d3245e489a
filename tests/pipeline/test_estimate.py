"""How long a run is said to take, before it and while it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.pipeline import estimate as module
from kd_lightning.pipeline import speeds
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.estimate import estimate
from kd_lightning.pipeline.preflight import preflight
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.stages import plan
from kd_lightning.runtime import clock
from kd_lightning.runtime.clock import Clock
from tests.conftest import tiny_overrides
from tests.data.corpus.texts import made, written
from tests.end_to_end.test_lm_experiments import language_model

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


@pytest.mark.parametrize(("batches", "expected"), [(9, [1, 3, 5, 7]), (2, [0, 1])])
def test_a_few_batches_of_a_split_are_fetched(
    batches: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []

    class Split(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __getitem__(self, places: list[int]) -> dict[str, torch.Tensor]:
            fetched.append(places[0])
            return {"x": torch.tensor(places)}

    loader = torch.utils.data.DataLoader(
        Split(),
        sampler=[[place] for place in range(batches)],
        batch_size=None,  # type: ignore[arg-type]
    )
    monkeypatch.setattr(module, "_seconds", lambda call, given: float(len(given)))
    seconds = module._evaluation(torch.nn.Linear(1, 1), loader, torch.device("cpu"))
    assert fetched == expected
    assert seconds == len(expected) * batches


def language_models(composed: Composed, tmp_path: Path, *more: str) -> Run:
    place = language_model(tmp_path / "teacher", 280, made(20))
    return Run(
        composed(
            "data=lm_text", f"data.train_file={written(tmp_path, made(60))}", f"data.tokenizer={place}",
            "data.block_size=32", "data.batch_size=4", f"teacher.checkpoint={place}", "teacher.precision=float32",
            "model@student=causal_lm_from_teacher", "student.layers=1", "student.width=8", "temperature=1",
            "distillation=sparse_kd", "teacher.cache_top_k=8", "trainer.max_steps=4", "trainer.precision=32-true",
            "stages=[baseline,distill]", "validations=1", f"run_dir={tmp_path / 'run'}", *more,
        ),
        Console(quiet=True),
    )  # fmt: skip


def test_the_texts_that_the_report_has_language_models_generate_are_counted(
    composed: Composed, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST", 1)
    seen: dict[str, object] = {}

    def generation_seconds(run: Run, networks: dict[str, object]) -> float:
        seen.update(networks)
        return 1e6

    monkeypatch.setattr(module, "generation_seconds", generation_seconds)
    run = language_models(composed, tmp_path)
    stages = plan(run)
    found = estimate(run, stages, preflight(run, stages))
    assert found is not None
    assert 1e6 < found.parts["report"] < 1e6 + 100
    assert list(seen) == ["baseline", "baseline_initialised", "distill", "teacher"]
    assert seen["teacher"] is run.teacher.network


def test_a_texts_seconds_and_a_tokens_are_told_apart_by_a_few_tokens(
    composed: Composed, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock, timed, longest = language_models(composed, tmp_path), [0.0], [], []
    real = speeds._generated

    def generated(run: Run, networks: Any, long: Any, short: Any, new: int) -> Any:
        found = real(run, networks, long, short, new)  # can be called so
        clock[0] += 10.0 + 2.0 * new
        timed.append(new)
        longest.append(len(long))
        return found

    monkeypatch.setattr(speeds, "_generated", generated)
    monkeypatch.setattr(speeds, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = speeds.generation_seconds(run, {"teacher": run.teacher.network, "distill": run.teacher.network})
    assert seconds == pytest.approx(speeds.SPEED_PROMPTS * (10.0 + 2.0 * 16))  # half a block
    assert max(timed) < 16
    assert set(longest) == {1}
