"""What `kd-status` reads of a run's folder, checked: plan, stages' records, a sweep point's result."""

from __future__ import annotations

import math
import re
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kd_lightning.config.sweep import FAILURE, SCORE
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.seals import read_sealed, write_sealed
from kd_lightning.training.run_folder import is_finished, read_stage, train_again

if TYPE_CHECKING:
    from kd_lightning.pipeline.stages import Stage
    from kd_lightning.runtime.clock import Clock

PLAN = "plan.json"
"""What a run is going to train."""
_LAYOUT = re.compile(r"(tasks/[^/]+/)?teacher[^/]*|assistant_\d+|seed_-?\d+/[^/]+")
"""Where a stage's folder may be inside a run's."""
_POINT_AGAIN = "start the same sweep again"
_EXPECTED = {str: "a text", int: "a count", float: "a number", list: "a list", dict: "an object"}
_Kind = TypeVar("_Kind", str, int, float, list[Any], dict[str, Any])


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run is going to train.

    Attributes:
        path: Its folder inside the run's.
        name: What it is called on the screen.
        kind: What it is for; empty where no plan tells.
        steps: Its optimizer steps, if known.
    """

    path: str
    name: str
    kind: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run is going to train.

    Attributes:
        stages: In the order in which they are trained.
        command: The command that goes on with it; empty where it is none of kd-train's.
        seconds: How long each stage is expected to take, by its path, and the report.
        reported: A digest of these stages' trainings and of those of their report; empty until it is written.
    """

    stages: tuple[PlannedStage, ...]
    command: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    reported: str = ""


@dataclass(frozen=True)
class Record:
    """What is read of a finished stage's record.

    Attributes:
        steps: Its optimizer steps.
        seconds: Its training time.
        monitor: The score that selected its weights.
        score: That score on validation.
        training: The fingerprint of its settings and the sha256 of its weights.
    """

    steps: int
    seconds: float
    monitor: str
    score: float
    training: str


def write_plan(folder: Path, stages: Sequence[Stage], clock: Clock | None, command: str) -> None:
    """Write what a run is going to train, unless these very stages are planned and finished."""
    planned = tuple(PlannedStage(one.path, one.name, one.kind, one.steps) for one in stages)
    try:
        known = read_plan(folder)
    except KDError:
        known = None
    if known is None or known.stages != planned or not all(is_finished(folder / one.path) for one in planned):
        _write(folder, Plan(planned, command, {} if clock is None else clock.parts))


def _write(folder: Path, plan: Plan) -> None:
    write_sealed(folder / PLAN, asdict(plan))


def read_plan(folder: Path) -> Plan | None:
    """Read what a run is going to train; None where nothing is planned.

    Raises:
        KDError: The plan is damaged, or names a place that is no stage's.
    """
    file = folder / PLAN
    if not file.exists():
        return None
    remedy = f"remove it; the same kd-train writes it again, and kd-status reads the stages of {folder} without it"
    content = read_sealed(file, remedy)
    stages = []
    for one in _entry(content, "stages", list, file, remedy):
        path, name, kind = (_entry(one, key, str, file, remedy) for key in ("path", "name", "kind"))
        if not _LAYOUT.fullmatch(path) or ".." in path.split("/") or not path.isprintable():
            raise KDError(f"{file}: path is {reprlib.repr(path)}, expected one such as seed_0/distill: {remedy}")
        stages.append(PlannedStage(path, name, kind, _entry(one, "steps", int, file, remedy)))
    seconds = _entry(content, "seconds", dict, file, remedy)
    return Plan(
        tuple(stages), _of_ours(_entry(content, "command", str, file, remedy)),
        {part: _entry(seconds, part, float, file, remedy) for part in seconds},
        _entry(content, "reported", str, file, remedy),
    )  # fmt: skip


def _of_ours(command: str) -> str:
    """Return a command line if a shell runs kd-train by it and nothing else; else an empty text."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    trains = words[:1] == ["kd-train"] or words[:2] == ["kd", "train"]
    return command if trains and shlex.join(words) == command else ""


def read_record(folder: Path) -> Record:
    """Read the record of a finished stage.

    Raises:
        KDError: It is missing or damaged.
    """
    content, file, remedy = read_stage(folder), folder / "stage.json", train_again(folder)
    monitor = _entry(content, "monitor", str, file, remedy)
    weights = _entry(_entry(content, "files", dict, file, remedy), "model.safetensors", str, file, remedy)
    return Record(
        _entry(content, "steps", int, file, remedy), _entry(content, "seconds", float, file, remedy), monitor,
        _entry(_entry(content, "validation", dict, file, remedy), monitor, float, file, remedy),
        _entry(content, "fingerprint", str, file, remedy) + weights,
    )  # fmt: skip


def kept_step(seals: Path) -> int | None:
    """Return the step of the checkpoint that is sealed; None where that cannot be read."""
    try:
        return _entry(read_sealed(seals, ""), "step", int, seals, "")
    except KDError:
        return None


def read_score(folder: Path) -> tuple[str, float]:
    """Read what a sweep's point was measured by, and its score."""
    file = folder / SCORE
    content = read_sealed(file, _POINT_AGAIN, required=False)
    return _entry(content, "metric", str, file, _POINT_AGAIN), _entry(content, "score", float, file, _POINT_AGAIN)


def read_failure(folder: Path) -> str:
    """Read why a sweep's point failed."""
    file = folder / FAILURE
    content = read_sealed(file, _POINT_AGAIN, required=False)
    return ": ".join(_entry(content, key, str, file, _POINT_AGAIN) for key in ("type", "error"))


def mark_reported(folder: Path, trainings: str) -> None:
    """Keep with the plan that the report, of these trainings, is of its stages as they are now."""
    try:
        plan = read_plan(folder)
        if plan is not None and plan.reported != (reported := _reported(folder, plan, trainings)):
            _write(folder, Plan(plan.stages, plan.command, plan.seconds, reported))
    except KDError:  # another command has planned more since
        return


def is_reported(folder: Path, plan: Plan) -> bool:
    """Return whether a run's report is of the trainings that its planned stages hold."""
    file = folder / "report.json"
    try:
        settings = _entry(read_sealed(file, "", required=False), "settings", dict, file, "")
        return plan.reported == _reported(folder, plan, _entry(settings, "trainings", str, file, ""))
    except KDError:
        return False


def _reported(folder: Path, plan: Plan, trainings: str) -> str:
    return digest([trainings, *(read_record(folder / one.path).training for one in plan.stages)])


def _entry(content: Any, key: str, kind: type[_Kind], file: Path, remedy: str) -> _Kind:
    """Return an entry of a JSON object of this kind: counts of 0 and more, numbers that are finite."""
    value: Any = content.get(key) if isinstance(content, dict) else None
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    sound = type(value) is kind
    if sound and kind is int:
        sound = 0 <= value < 2**63
    elif sound and kind is float:
        sound = math.isfinite(value)
    if not sound:
        raise KDError(f"{file}: {key} is {reprlib.repr(value)}, expected {_EXPECTED[kind]}: {remedy}")
    return cast(_Kind, value)
