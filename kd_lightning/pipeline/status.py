"""How far a run or a sweep is, read from its folder alone; nothing here imports torch."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from kd_lightning.config.sweep import FAILURE, OVERRIDES, SCORE
from kd_lightning.pipeline.run_records import (
    Plan,
    PlannedStage,
    is_reported,
    kept_step,
    read_failure,
    read_plan,
    read_record,
    read_score,
)
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import holder
from kd_lightning.training.run_folder import is_finished

LOCK = ".lock"
"""The lock that a run's command holds while it works."""
REPORT = "report"
"""The part of a run after its stages."""
_SEALS = "checkpoints/seals.json"
_STEP = re.compile("[0-9]{1,18}")
_STAGES = ("teacher*", "tasks/*/teacher*", "assistant_*", "seed_*/*")

State = Literal["finished", "running", "stopped", "failed", "damaged", "waiting"]


@dataclass(kw_only=True)
class StageStatus:
    """How far a stage is.

    Attributes:
        path: Its folder inside the run's.
        name: What it is called on the screen.
        kind: What it is for; empty where no plan tells.
        state: `waiting` has not begun, `stopped` was killed or interrupted.
        step: Optimizer steps that are done; of a stopped one those that are kept.
        steps: All of them, if known.
        since: Of a running one, the steps that are logged since it was started last.
        seconds: Training time of a finished one; of a running one since it was started last.
        left: Expected seconds that remain, if known.
        by: The process that trains it.
        note: The validation score, where it goes on, what it waits for, or what is wrong.
    """

    path: str
    name: str
    kind: str = ""
    state: State = "waiting"
    step: int | None = None
    steps: int | None = None
    since: int = 0
    seconds: float | None = None
    left: float | None = None
    by: str | None = None
    note: str = ""


@dataclass(kw_only=True)
class RunStatus:
    """How far a run is.

    Attributes:
        folder: Its folder.
        state: Of the whole.
        stages: In the order in which they are trained.
        left: Expected seconds that remain, with the report, if known.
        by: The process whose command works on it.
        note: The score of a sweep's point, the reason of its failure, or what comes next.
        command: The command that goes on with it, if known.
        report: Its page, once it is written.
        log: The log of its last SLURM job.
    """

    folder: Path
    state: State
    stages: list[StageStatus] = field(default_factory=list)
    left: float | None = None
    by: str | None = None
    note: str = ""
    command: str = ""
    report: Path | None = None
    log: Path | None = None


def sweep_points(folder: Path) -> list[Path]:
    """Return the folders of a sweep's points, in the order of their names; none where it is a run."""
    return [file.parent for file in sorted(folder.glob(f"*/{OVERRIDES}"))]


def point_status(folder: Path) -> RunStatus:
    """Read how far a sweep's point is; one that cannot be read is damaged, and hides no other."""
    try:
        return run_status(folder)
    except (KDError, OSError) as error:
        return RunStatus(folder=folder, state="damaged", note=str(error))


def run_status(folder: Path) -> RunStatus:
    """Read how far a run is.

    Raises:
        ConfigError: The folder holds no run.
        KDError: Its plan is damaged.
    """
    if not folder.is_dir():
        wrong = "a file" if folder.exists() else "no such folder"
        raise ConfigError(f"{folder}: {wrong}; expected the folder of a run or a sweep that kd-train wrote")
    plan = read_plan(folder) or Plan(tuple(PlannedStage(path, path) for path in _begun(folder)))
    if not plan.stages and not (folder / OVERRIDES).is_file():
        raise ConfigError(f"{folder} holds no run: expected the folder of a run or a sweep that kd-train wrote")
    stages = [stage_status(folder, one) for one in plan.stages]
    found = RunStatus(folder=folder, state="waiting", stages=stages, by=holder(folder / LOCK), command=plan.command)
    _add_order(found)
    report = folder / "report.html"
    found.report = report if report.is_file() else None
    logs = sorted(folder.glob("slurm/*.out"), key=lambda link: link.lstat().st_mtime)
    found.log = logs[-1] if logs else None
    found.state = _state(found)
    if found.state == "finished" and not is_reported(folder, plan):
        found.state, found.note = (
            "stopped",
            "its report is not known to be of these stages: the same kd-train makes sure",
        )
    found.left = _left(stages, plan.seconds) if found.state in ("running", "stopped") else None
    _add_point(found)
    return found


def _begun(folder: Path) -> list[str]:
    """Return the stages that have a folder, without a plan: in the order in which they were begun."""
    marks = [mark for pattern in _STAGES for mark in folder.glob(f"{pattern}/settings.json")]
    marks.sort(key=lambda mark: mark.stat().st_mtime)
    return [mark.parent.relative_to(folder).as_posix() for mark in marks]


def stage_status(run: Path, planned: PlannedStage) -> StageStatus:
    """Read how far a stage is."""
    folder = run / planned.path
    found = StageStatus(path=planned.path, name=planned.name, kind=planned.kind, steps=planned.steps)
    if is_finished(folder):
        try:
            record = read_record(folder)
            found.state, found.step, found.steps = "finished", record.steps, record.steps
            found.seconds, found.note = record.seconds, f"{record.monitor} {record.score:.4f}"
        except KDError as error:
            found.state, found.note = "damaged", str(error)
    elif (by := holder(folder / LOCK)) is not None:
        found.state, found.by = "running", by
        steps = _logged(folder)
        found.step = max([*(step + 1 for step in steps), _kept(folder) or 0]) or None
        found.since = max(steps) - min(steps) if steps else 0
        found.seconds = _since(folder / "settings.json")
    elif (folder / "settings.json").is_file():
        found.state, found.step = "stopped", _kept(folder)
        found.note = f"goes on from step {found.step}" if found.step else "begins again: no checkpoint is kept"
    return found


def _since(mark: Path) -> float | None:
    return max(time.time() - mark.stat().st_mtime, 0.0) if mark.is_file() else None


def _kept(folder: Path) -> int | None:
    """Return the step of the checkpoint from which a stopped stage goes on; None without one."""
    return kept_step(folder / _SEALS) if (folder / "checkpoints/resume.ckpt").is_file() else None


def _logged(folder: Path) -> list[int]:
    """Return the steps that a running stage has logged since it was started last."""
    logs = [log for log in folder.glob("csv/version_*/metrics.csv") if log.is_file()]
    if not logs:
        return []
    last = max(logs, key=lambda log: log.stat().st_mtime)
    lines = last.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last one may be half written
    try:
        return [int(row["step"]) for row in csv.DictReader(whole) if _STEP.fullmatch(str(row.get("step")))]
    except csv.Error:
        return []


def _add_order(run: RunStatus) -> None:
    """Note what each stage that has not begun waits for, and who is waited for."""
    todo = [stage for stage in run.stages if stage.state != "finished"]
    for before, stage in pairwise(todo):
        if stage.state == "waiting":
            stage.note = f"after {before.name}"
    for stage in todo:
        if stage.by is not None and run.by is not None and stage.by != run.by:
            run.note = f"waits for {stage.by}, which trains {stage.name}"


def _state(run: RunStatus) -> State:
    if any(stage.state == "damaged" for stage in run.stages):
        return "damaged"
    if run.by is not None or any(stage.by is not None for stage in run.stages):
        return "running"
    if run.stages and all(stage.state == "finished" for stage in run.stages) and run.report is not None:
        return "finished"
    return "stopped" if any(stage.state != "waiting" for stage in run.stages) else "waiting"


def _left(stages: Sequence[StageStatus], expected: Mapping[str, float]) -> float | None:
    """Set each unfinished stage's expected seconds; return all of them and the report's, if known.

    A running stage goes on at its own pace, others at that of all so far by the estimate. Without one, a step takes as
    long as in a finished stage of the same kind.
    """
    running = [one for one in stages if one.state == "running" and one.since and one.seconds and one.steps]
    spent = whole = 0.0
    for one in (*running, *(one for one in stages if one.state == "finished" and one.seconds)):
        if one.path in expected:
            spent += one.seconds or 0.0
            whole += expected[one.path] * (one.since / (one.steps or 1) if one in running else 1)
    pace = spent / whole if whole else 1.0
    for stage in (one for one in stages if one.state != "finished"):
        alike = [one for one in stages if one.state == "finished" and one.kind == stage.kind]
        each: float | None = None  # seconds a step
        if stage in running:
            each = (stage.seconds or 0.0) / stage.since
        elif stage.path in expected and stage.steps:
            each = expected[stage.path] * pace / stage.steps
        elif alike and alike[-1].step:
            each = (alike[-1].seconds or 0.0) / alike[-1].step
        if each is not None and stage.steps:
            stage.left = each * max(stage.steps - (stage.step or 0), 0)
    left = [one.left for one in stages if one.state != "finished"]
    known = [seconds for seconds in left if seconds is not None]
    return sum(known) + expected.get(REPORT, 0.0) * pace if len(known) == len(left) else None


def _add_point(run: RunStatus) -> None:
    """Add what a sweep recorded of its point."""
    if (run.folder / SCORE).is_file() and run.state != "running":
        metric, score = read_score(run.folder)
        run.state, run.note = "finished", f"{metric} {score:.4f}"
    elif (run.folder / FAILURE).is_file() and run.state != "running":
        run.state, run.note = "failed", read_failure(run.folder)
    elif (run.folder / OVERRIDES).is_file():
        run.command = "start the same sweep again"
