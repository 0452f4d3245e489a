"""A run's report as one HTML page without other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.evaluation.report import html
from kd_lightning.evaluation.report.differences import BASELINES
from kd_lightning.evaluation.report.html import Picture
from kd_lightning.evaluation.report.results import monitor, score_title
from kd_lightning.evaluation.report.table import MISSING, comparison_rows, ratio_line, short
from kd_lightning.evaluation.report.text import cell, reading, summary

MOST_LISTED = 20
"""Classes whose gain is listed: of more, those that change most."""


def run_page(report: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """Write the page of a run.

    Args:
        report: The document `build_report` returns.
        pictures: The pictures below the tables, in order.
    """
    heading, *body = comparison_rows(report)
    details = report.get("details") or {"parts": [], "student": "", "seed": None}
    models, student = report["models"], details["student"]
    return html.render(
        "run.html",
        pictures,
        title=f"{report['task']}: distillation report",
        headline=summary(report),
        warnings=report["warnings"],
        score=score_title(report),
        source=report["data"].get("learns_from", "labels"),
        unit=report["data"].get("unit", "example"),
        scores=_scores(report),
        ratio=ratio_line(report),
        heading=heading[1:],
        rows=body,
        seed=details["seed"],
        student=models[student]["title"] if student else "",
        parts=[_part(report, part, student) for part in details["parts"]],
        samples=[
            (one["prompt"], [(models[name]["title"], one["models"][name]) for name in models if name in one["models"]])
            for one in report.get("samples", ())
        ],
        reading=reading(report),
        command=report["command"],
        settings=[
            ("setting", [(name, cell(value)) for name, value in report["settings"].items()]),
            ("stage, seconds", [(name, short(value)) for name, value in report["stages"].items()]),
            ("environment", [(name, cell(value)) for name, value in report["environment"].items()]),
        ],
        footer=html.footer(report["environment"]),
    )  # fmt: skip


def _scores(report: Mapping[str, Any]) -> list[list[str]]:
    """Return each model's title, its score with its error, and by how much it differs from each baseline."""
    rows = []
    for name, model in report["models"].items():
        against = report["differences"].get(name, {})
        score = _with_error(model["test"].get(monitor(report)), "")
        rows.append([model["title"], score, *(_with_error(against.get(baseline), "+") for baseline in BASELINES)])
    return rows


def _with_error(measured: Mapping[str, Any] | None, sign: str) -> str:
    """Return a score or a difference with its standard error, in as many digits."""
    if measured is None or measured["mean"] is None:
        return MISSING
    mean, error = measured["mean"], measured.get("standard_error")
    digits = 3 if abs(mean) < 10 else 1
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _part(report: Mapping[str, Any], part: Mapping[str, Any], student: str) -> dict[str, Any]:
    """Return what the page shows of a task, or of one of several: classes, confusions and examples."""
    names, models = part["class_names"], part["models"]
    confused = [name for name in dict.fromkeys(("teacher", student)) if models.get(name, {}).get("confusion")]
    return {
        "name": part["name"],
        "classes": _gains(report, part, student) if models.get(student, {}).get("labels") else None,
        "names": names,
        "confusions": [(report["models"][name]["title"], _shares(models[name])) for name in confused],
        "unpredicted": [
            f"{report['models'][name]['title']}: {count:,} of {sum(models[name]['labels']):,}"
            for name in report["models"]
            if (count := models.get(name, {}).get("unpredicted"))
        ],
        "examples": [_example(names, one) for one in part["apart"]],
    }


def _gains(report: Mapping[str, Any], part: Mapping[str, Any], student: str) -> dict[str, Any]:
    """Return F1 by class of the teacher, the baselines and the student, and what the student gains.

    Of more than `MOST_LISTED` classes these are the ones that change most.
    """
    listed = [name for name in dict.fromkeys(("teacher", *BASELINES, student)) if name in part["models"]]
    scores = {name: _f1(part["models"][name]) for name in listed}
    base = next((name for name in BASELINES if name in scores and name != student), student)
    labels = part["models"][student]["labels"]
    numbers = [number for number, count in enumerate(labels) if count]
    gains = {number: scores[student][number] - scores[base][number] for number in numbers}
    chosen = sorted(numbers, key=lambda number: -abs(gains[number]))[:MOST_LISTED]
    rows = [
        [part["class_names"][number], f"{labels[number]:,}", *(f"{scores[name][number]:.3f}" for name in listed),
         f"{gains[number]:+.3f}" if base != student else MISSING]
        for number in sorted(chosen, key=lambda number: -gains[number])
    ]  # fmt: skip
    titles = [report["models"][name]["title"] for name in listed]
    return {
        "heading": ["class", "test labels", *titles, "gain over labels"], "rows": rows, "of": len(numbers),
        "below": [row[-1].startswith("-") for row in rows],
    }  # fmt: skip


def _f1(model: Mapping[str, Any]) -> list[float]:
    """Return each class's F1, `2 right / (labels + predictions)`; 0 where there are none."""
    counts = zip(model["labels"], model["predicted"], model["right"], strict=True)
    return [2 * right / max(labels + predicted, 1) for labels, predicted, right in counts]


def _shares(model: Mapping[str, Any]) -> list[list[tuple[int, str]]]:
    """Return a confusion's counts with their shares of the labels, as the strength of a cell's colour."""
    rows = zip(model["confusion"], model["labels"], strict=True)
    return [[(count, f"{0.6 * count / max(labels, 1):.3f}") for count in row] for row, labels in rows]


def _example(names: Sequence[str], one: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example on which student and teacher differ, as the page shows it."""
    label = one["label"]
    is_class = isinstance(one["student"], list)
    return {
        "text": one.get("text"), "png": one.get("png"), "index": one["index"],
        "distance": MISSING if one["distance"] is None else f"{one['distance']:.3f}",
        "label": "none" if label is None else names[int(label)] if is_class else f"{label:.3f}",
        "student": _predicted(names, one["student"]), "teacher": _predicted(names, one["teacher"]),
    }  # fmt: skip


def _predicted(names: Sequence[str], predicted: Any) -> str:
    """Return the likeliest classes with their probabilities, or a score; of NaN a dash."""
    if not isinstance(predicted, list):
        return MISSING if predicted is None else f"{predicted:.3f}"
    return ", ".join(f"{names[int(number)]} {chance:.2f}" for number, chance in predicted) or MISSING
