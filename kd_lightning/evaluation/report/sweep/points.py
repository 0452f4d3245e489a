"""Reads the points of a sweep from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_lightning.config.sweep import FAILURE, GRID, OVERRIDES, SCORE
from kd_lightning.evaluation.report.files import load_report
from kd_lightning.evaluation.report.results import score_title, sign
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.runtime.seals import read_sealed
from kd_lightning.training.run_folder import read_config

Value = float | str
"""A parameter's value in a point: a number if its text is one."""

NOT_GIVEN = "as configured"
"""The value of a parameter that only other points set, for an unfinished point."""

_DECIDING = {"teacher": "teacher", "baseline": "baseline", "distill": "distilled", "finetune": "finetuned"}
"""The model of the report that a point's last stage trains."""


@dataclass(frozen=True)
class Point:
    """One folder of a sweep.

    Attributes:
        folder: Its folder.
        overrides: Its overrides: the text of each value by key.
        command: The command line that reproduces it.
        sweeper: The class of its sweeper.
        score: Best validation score; None unless it is finished.
        metric: The name of the score, such as `accuracy`; None unless it is finished.
        report: Its `report.json`; None unless it is finished.
        config: Its whole configuration; empty unless it is finished.
        failure: Its `failure.json`; None unless it failed.
    """

    folder: Path
    overrides: dict[str, str]
    command: str
    sweeper: str = GRID
    score: float | None = None
    metric: str | None = None
    report: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None

    def value(self, key: str) -> Value:
        """Return a parameter's value from its overrides or its configuration."""
        if key in self.overrides:
            return as_value(self.overrides[key])
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return NOT_GIVEN if node is None else as_value(str(node))

    @property
    def seed(self) -> Value:
        """Return its (first) seed."""
        return self.value("seed")

    @property
    def model_name(self) -> str:
        """Return the scored model's name in the report."""
        assert self.config is not None
        return _DECIDING[self.config["stages"][-1]]

    @cached_property
    def model(self) -> dict[str, Any]:
        """Return the report's entry of the scored model."""
        assert self.report is not None
        found: dict[str, Any] = self.report["models"][self.model_name]
        return found

    def scores(self, split: str) -> list[float]:
        """Return the deciding model's score on a split, one for each of the point's seeds."""
        assert self.score is not None
        assert self.report is not None
        if split == "validation" and len(self.report["seeds"]) == 1:
            return [self.score]
        return values_of(self.model, split, self.metric)


def title_of(document: Mapping[str, Any]) -> str:
    """Return the title of a sweep's score from its points' reports, or its name."""
    name: str = document["score"] or ""
    return score_title(document, name) if name in document["scores"] else name


def better_of(document: Mapping[str, Any]) -> int:
    """Return 1 where more of a sweep's score is better, -1 where less is."""
    return sign(document, document["score"]) if document["score"] in document["scores"] else 1


def values_of(model: dict[str, Any], split: str, metric: str | None) -> list[float]:
    """Return a model's scores on a split, one for each seed that has one."""
    described = model[split].get(metric, {"values": []})
    return [value for value in described["values"] if value is not None]


def read_points(folder: Path) -> list[Point]:
    """Read a sweep's points, in the order of their names.

    Raises:
        ConfigError: There is no such folder, or it holds no points.
        DataError: A file of a point is damaged.
    """
    if not folder.is_dir():
        wrong = "a file" if folder.exists() else "no such folder"
        raise ConfigError(f"{folder}: {wrong}; expected the folder of a sweep (kd-train -m ...)")
    points = [_read(file.parent) for file in sorted(folder.glob(f"*/{OVERRIDES}"))]
    if points:
        return points
    if any((folder / name).exists() for name in ("report.json", "config.yaml", "teacher", "seed_0")):
        where = f"its report is {folder / 'report.html'}" if (folder / "report.html").exists() else "it is not finished"
        raise ConfigError(f"{folder} holds a single run, not a sweep: {where}")
    if sweeps := sorted({str(file.parent.parent) for file in folder.glob(f"*/*/{OVERRIDES}")}):
        raise ConfigError(
            f"{folder} holds no points of a sweep, but folders of some: kd-report {' or '.join(sweeps[:3])}"
        )
    raise ConfigError(
        f"{folder} holds no points of a sweep: kd-train -m ... gives each a folder with {OVERRIDES} in it"
    )


def as_value(text: str) -> Value:
    """Return a parameter's value as a number where it is one.

    >>> as_value("1e-3"), as_value("dkd"), as_value("nan")
    (0.001, 'dkd', 'nan')
    """
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _read(folder: Path) -> Point:
    given = _json(folder / OVERRIDES)
    pairs = (override.lstrip("+").partition("=") for override in given["overrides"])
    begun = Point(folder, {key: value for key, _, value in pairs}, given["command"])
    begun = replace(begun, sweeper=given.get("sweeper", begun.sweeper))  # earlier versions did not write it
    if (folder / FAILURE).is_file():
        return replace(begun, failure=_json(folder / FAILURE))
    if not (folder / SCORE).is_file():
        return begun
    score = _json(folder / SCORE)
    return replace(
        begun, score=score["score"], metric=score["metric"], report=load_report(folder),
        config=read_config(folder),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path, "start the same sweep again, which writes it again", required=False)
    except KDError as error:
        raise DataError(str(error)) from error
