"""How far a run is, read from its folder while it is trained, after a kill and when it is done."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.cli.status import main
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.run_records import PLAN
from kd_lightning.pipeline.status import LOCK, run_status
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import alone, holder
from kd_lightning.runtime.seals import read_sealed, write_sealed
from tests import ROOT
from tests.conftest import tiny_overrides
from tests.pipeline.planned_runs import STAGES, finish, planned, stop

ME = f"process {os.getpid()} on {socket.gethostname()}"


def states(run: Path) -> list[str]:
    return [stage.state for stage in run_status(run).stages]


def test_what_is_done_what_was_killed_and_what_waits(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    assert run_status(run).state == "waiting"
    finish(run, STAGES[0])
    stop(run, STAGES[1], 40)
    found = run_status(run)
    assert found.state == "stopped"
    assert found.command == "kd-train name=a"
    teacher, baseline, distill = found.stages
    assert (teacher.state, teacher.seconds, teacher.note) == ("finished", 10.0, "accuracy 0.7500")
    assert (baseline.state, baseline.step, baseline.note) == ("stopped", 40, "goes on from step 40")
    assert (distill.state, distill.note) == ("waiting", "after baseline, seed 0")


def test_a_stage_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    write_sealed(run / "teacher/settings.json", {})
    assert run_status(run).stages[0].note == "begins again: no checkpoint is kept"


def test_a_stage_whose_lock_is_held_runs_and_tells_its_step(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    stop(run, "teacher", 40)
    log = run / "teacher/csv/version_1/metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("epoch,step,train/loss\n0,49,0.5\n,x,\n0,59,0.4\n0,6")
    with alone(run / LOCK, print), alone(run / "teacher" / LOCK, print):
        found = run_status(run)
    assert (found.state, found.by) == ("running", ME)
    assert (found.stages[0].state, found.stages[0].step, found.stages[0].by) == ("running", 60, ME)
    assert found.stages[0].since == 10
    assert found.note == ""
    assert states(run) == ["stopped", "waiting", "waiting"]


def test_who_is_waited_for_is_named(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    lock = filelock.FileLock(run / "teacher" / LOCK)
    (run / "teacher").mkdir()
    with alone(run / LOCK, print), lock:
        (run / "teacher" / LOCK).write_text("process 1 on other\n")
        assert run_status(run).note == "waits for process 1 on other, which trains teacher"


def test_the_time_left_goes_by_the_estimate_and_the_pace_so_far(tmp_path: Path) -> None:
    expected = {STAGES[0]: 5.0, STAGES[1]: 20.0, STAGES[2]: 30.0, "report": 4.0}
    run = planned(tmp_path / "run", expected)
    finish(run, STAGES[0], seconds=10.0)  # twice as long as expected
    stop(run, STAGES[1], 40)
    found = run_status(run)
    assert [stage.left for stage in found.stages] == [None, pytest.approx(2 * 20 * 0.6), pytest.approx(2 * 30)]
    assert found.left == pytest.approx(24 + 60 + 8)


def test_a_running_stage_goes_on_at_its_own_pace(tmp_path: Path) -> None:
    """10 of 100 steps took 20 s, 10 times what was expected: 40 are left, and the next stage takes 10 times as long."""
    run = planned(tmp_path / "run", {STAGES[0]: 20.0, STAGES[1]: 30.0, STAGES[2]: 30.0})
    stop(run, "teacher", 50)
    log = run / "teacher/csv/version_1/metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,train/loss\n49,0.5\n59,0.4\n")
    begun = time.time() - 20
    os.utime(run / "teacher/settings.json", (begun, begun))
    with alone(run / "teacher" / LOCK, print):
        found = run_status(run)
    assert found.stages[0].left == pytest.approx(40 * 2, rel=0.1)
    assert found.stages[1].left == pytest.approx(10 * 30, rel=0.1)


def test_without_an_estimate_stages_alike_tell_the_time(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    finish(run, STAGES[0])
    assert run_status(run).left is None, "nothing is known of students"
    plan = read_sealed(run / PLAN, "")
    plan["stages"] = [{**one, "kind": "baseline"} for one in plan["stages"]]
    write_sealed(run / PLAN, plan)
    assert run_status(run).left == pytest.approx(20.0)


def test_a_damaged_stage_is_named(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    finish(run, "teacher")
    (run / "teacher/stage.json").write_text("{}")
    found = run_status(run)
    assert found.state == found.stages[0].state == "damaged"
    assert "teacher/stage.json is damaged" in found.stages[0].note


@pytest.mark.parametrize(("name", "words"), [("none", "no such folder"), ("file", "a file"), ("empty", "holds no run")])
def test_what_is_no_run_is_refused(name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=words):
        run_status(tmp_path / name)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / name)])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_damaged_plan_is_no_defect(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    (run / PLAN).write_text("{")
    with pytest.raises(KDError, match="remove it"):
        run_status(run)
    (run / PLAN).unlink()
    stop(run, "teacher", 3)
    assert [stage.path for stage in run_status(run).stages] == ["teacher"], "without a plan folders tell"


def test_a_sweep_has_a_line_a_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a=1", "a=2", "a=3"):
        write_sealed(planned(tmp_path / "sweep" / name) / "overrides.json", {"overrides": [name]})
    write_sealed(tmp_path / "sweep/a=1/score.json", {"score": 0.875, "metric": "accuracy"})
    write_sealed(tmp_path / "sweep/a=2/failure.json", {"type": "DataError", "error": "\x1b[2J no column"})
    finish(tmp_path / "sweep/a=3", "teacher")
    main([str(tmp_path / "sweep")])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:4]] == [["a=1", "finished"], ["a=2", "failed"], ["a=3", "stopped"]]
    assert "accuracy 0.8750" in printed[1]
    assert "DataError: \\x1b[2J no column" in printed[2]
    assert "1 / 3 stages" in printed[3]
    assert printed[4] == "3 points: 1 finished, 1 failed, 1 stopped"
    main([str(tmp_path / "sweep"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [point["state"] for point in document["points"]] == ["finished", "failed", "stopped"]


def test_a_real_run_is_followed_to_its_end(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    overrides = tiny_overrides(toy_csv, tmp_path / "run")
    seen: list[Any] = []

    def begin() -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            run_status(tmp_path / "run")
        seen.append("begun")

    run = Run(composed(*overrides, "stages=[teacher,baseline]"), Console(quiet=True))
    train_all(run, begin, "kd-train x")
    assert seen == ["begun"]
    found = run_status(tmp_path / "run")
    assert [(stage.path, stage.state, stage.steps) for stage in found.stages] == [
        ("teacher", "finished", 36), ("seed_0/baseline", "finished", 22),
    ]  # fmt: skip
    assert found.state == "stopped", "its report is missing"
    before = (tmp_path / "run" / PLAN).read_bytes()
    again = Run(composed(*overrides, "stages=[teacher,baseline]"), Console(quiet=True))
    train_all(again, None, "kd-train y")
    assert (tmp_path / "run" / PLAN).read_bytes() == before, "what is planned and finished is not planned again"
    main([str(tmp_path / "run")])
    assert "to go on: kd-train x" in capsys.readouterr().out
    compare(again, "kd-train y")
    assert run_status(tmp_path / "run").state == "finished"
    train_all(Run(composed(*overrides, "stages=[teacher]"), Console(quiet=True)), None, "kd-train z")
    found = run_status(tmp_path / "run")
    assert ([stage.path for stage in found.stages], found.state) == (["teacher"], "stopped")


def test_nothing_heavy_is_imported_and_nothing_is_written(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kd_lightning.cli", "status", str(run)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "distill, seed 0" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "transformers", "pandas", "numpy", "hydra", "omegaconf"}
    assert sorted(tmp_path.rglob("*")) == before


def test_nobody_holds_a_lock_that_is_not_there_or_left_behind(tmp_path: Path) -> None:
    assert holder(tmp_path / LOCK) is None
    assert not (tmp_path / LOCK).exists()
    with alone(tmp_path / LOCK, print):
        assert holder(tmp_path / LOCK) == ME
    assert holder(tmp_path / LOCK) is None
