"""Builds a sweep's document: plain JSON data for the page and the pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kd_lightning.config.sweep import GRID
from kd_lightning.evaluation.report.build import to_plain
from kd_lightning.evaluation.report.differences import describe
from kd_lightning.evaluation.report.sweep.points import Point, Value, values_of

Key = tuple[Value, ...]
SAME_START = "baseline_initialised"
"""In a report: the student from labels that starts as the distilled one does."""


def build_sweep(points: Sequence[Point]) -> dict[str, Any]:
    """Assemble the document of a sweep.

    Points that differ in nothing but their seed are one configuration. The configuration with the best mean on
    validation is chosen, among those with the most seeds, so that none wins by luck with few. The test split's
    score is taken from the chosen one only.

    Args:
        points: What `read_points` returns.

    Returns:
        `score` (what was measured), `scores` (how it is to be read), `against` (the model of a report that
        distilled students are compared with: the one from labels, with the same start where all points have one; None
        where nothing is distilled), `parameters` (what the points differ in but for
        the seed, with the mean over all else of each value), `configurations` (the best first), `chosen` (None where no
        point is finished), `noise` (the standard deviation over seeds, pooled over configurations), `teacher` (its
        validation score and its price; None where there is none), `search` (whether a sweeper chose the points as it
        went), `failed`, `unfinished`, and `environment`.
    """
    names = _varied(points)
    groups: dict[Key, list[Point]] = {}
    for point in points:
        if point.score is not None:
            groups.setdefault(tuple(point.value(name) for name in names), []).append(point)
    finished = [point for group in groups.values() for point in group]
    against = _against(finished)
    scores: dict[str, Any] = next((point.report["scores"] for point in finished if point.report), {})
    better = -1 if finished and scores.get(finished[0].metric or "", {}).get("mode") == "min" else 1
    configurations = [
        _configuration(dict(zip(names, key, strict=True)), group, against, better) for key, group in groups.items()
    ]
    configurations.sort(key=lambda entry: -better * entry["validation"]["mean"])
    plain: dict[str, Any] = to_plain({
        "score": finished[0].metric if finished else None,
        "scores": scores,
        "against": against,
        "parameters": [_parameter(name, configurations) for name in names],
        "configurations": configurations,
        "chosen": _chosen(configurations, groups, names),
        "noise": _noise(configurations),
        "teacher": _teacher(finished),
        "search": any(point.sweeper != GRID for point in points),
        "failed": [_lost(point, names) | (point.failure or {}) for point in points if point.failure],
        "unfinished": [_lost(point, names) for point in points if point.score is None and not point.failure],
        "environment": finished[0].report["environment"] if finished and finished[0].report else {},
    })  # fmt: skip
    return plain


def _against(finished: Sequence[Point]) -> str | None:
    """Return the model that distilled students are compared with; None where nothing is distilled."""
    if not any(point.model_name in ("distilled", "finetuned") for point in finished):
        return None
    started = all(point.report and SAME_START in point.report["models"] for point in finished)
    return SAME_START if started else "baseline"


def _varied(points: Sequence[Point]) -> list[str]:
    """Return the keys that differ between points, except the seed, in command-line order."""
    keys = dict.fromkeys(key for point in points for key in point.overrides)
    return [key for key in keys if key != "seed" and len({point.value(key) for point in points}) > 1]


def _configuration(
    values: dict[str, Value], points: Sequence[Point], against: str | None, better: int
) -> dict[str, Any]:
    """Describe the finished points that differ only in the seed."""
    pairs = [pair for point in points for pair in _pairs(point, against)]
    return {
        "values": values,
        "validation": describe(score for point in points for score in point.scores("validation")),
        "baseline": describe(base for _, base in pairs if base is not None),
        "gain": describe(better * (score - base) for score, base in pairs if score is not None and base is not None),
        **_price([point.model for point in points]),
        "points": [
            {"folder": point.folder.name, "seed": point.seed, "score": point.score, "command": point.command}
            for point in points
        ],
    }  # fmt: skip


def _pairs(point: Point, against: str | None) -> list[tuple[float | None, float | None]]:
    """Return a point's scores on validation, each with that of the student from labels of the same seed."""
    models = {} if point.report is None else point.report["models"]
    if against not in models:
        return []
    score, base = (one["validation"].get(point.metric, {"values": []}) for one in (point.model, models[against]))
    return list(zip(score["values"], base["values"], strict=False))


def _chosen(
    configurations: Sequence[dict[str, Any]], groups: dict[Key, list[Point]], names: Sequence[str]
) -> dict[str, Any] | None:
    """Return the best configuration on validation, and for it alone the score on the test split."""
    if not configurations:
        return None
    most = max(len(entry["validation"]["values"]) for entry in configurations)
    best = next(entry for entry in configurations if len(entry["validation"]["values"]) == most)
    points = groups[tuple(best["values"][name] for name in names)]
    test = describe(score for point in points for score in point.scores("test"))
    return {"rank": configurations.index(best), "values": best["values"], "test": test}


def _parameter(name: str, configurations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe each value of a parameter by its mean score over everything else."""
    groups: dict[Value, list[dict[str, Any]]] = {}
    for entry in configurations:
        groups.setdefault(entry["values"][name], []).append(entry)
    values = [
        _value(value, groups[value]) for value in sorted(groups, key=lambda value: (isinstance(value, str), value))
    ]
    means = [found["mean"] for found in values]
    return {
        "name": name,
        "numeric": bool(values) and not isinstance(values[-1]["value"], str),
        # a mean over everything else needs repeated values
        "searched": 1 < len(groups) == len(configurations) and len(configurations[0]["values"]) > 1,
        "values": values,
        "moves": max(means) - min(means) if means else math.nan,
    }


def _value(value: Value, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe one value of a parameter, and the students from labels beside it."""
    described = describe(score for entry in entries for score in entry["validation"]["values"])
    baselines = [entry["baseline"]["mean"] for entry in entries if entry["baseline"]["mean"] is not None]
    return {"value": value, **described, "baseline": _mean(baselines)}


def _noise(configurations: Sequence[dict[str, Any]]) -> float:
    """Return the standard deviation over seeds, pooled over the configurations that have several."""
    several = [entry["validation"] for entry in configurations if len(entry["validation"]["values"]) > 1]
    freedom = sum(len(found["values"]) - 1 for found in several)
    squares = sum(found["std"] ** 2 * (len(found["values"]) - 1) for found in several)
    return math.sqrt(squares / freedom) if freedom else math.nan


def _teacher(points: Sequence[Point]) -> dict[str, Any] | None:
    """Return the shared teacher's mean validation score and price."""
    models = [
        point.report["models"]["teacher"] for point in points if point.report and "teacher" in point.report["models"]
    ]
    scores = [score for model in models for score in values_of(model, "validation", points[0].metric)]
    return {"validation": statistics.fmean(scores), **_price(models)} if scores else None


def _price(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return models' size, and their latency for one example: the mean of their medians."""
    return {
        "parameters": (models[0]["size"] or {}).get("parameters"),
        "latency_ms": _mean(model["latency_ms"]["p50"] for model in models if model["latency_ms"]),
    }


def _lost(point: Point, names: Sequence[str]) -> dict[str, Any]:
    """Describe a point that has no score."""
    values = {name: point.value(name) for name in names} | ({"seed": point.seed} if "seed" in point.overrides else {})
    return {"folder": Path(point.folder).name, "values": values, "command": point.command}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return statistics.fmean(listed) if listed else math.nan
