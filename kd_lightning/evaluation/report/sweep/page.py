"""A sweep's report as one HTML page without other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.evaluation.report import html
from kd_lightning.evaluation.report.html import Picture
from kd_lightning.evaluation.report.sweep.axes import LETTERS, baseline_name, label
from kd_lightning.evaluation.report.sweep.points import better_of, title_of
from kd_lightning.evaluation.report.table import spread

UNFINISHED = "running or stopped: start the same sweep again to resume it"


def render(document: Mapping[str, Any], name: str, pictures: Sequence[Picture]) -> str:
    """Write the page.

    Args:
        document: What `build_sweep` returns.
        name: The sweep's name, for the heading.
        pictures: The pictures between summary and tables, in order.
    """
    return html.render(
        "sweep/page.html",
        pictures,
        title=f"Sweep {name}",
        sentences=sentences(document),
        names=[parameter["name"] for parameter in document["parameters"]],
        score=title_of(document),
        baseline=baseline_name(document),
        has_baseline=any(entry["gain"]["mean"] is not None for entry in document["configurations"]),
        rows=[_row(document, rank) for rank in range(len(document["configurations"]))],
        lost=[
            ("Failed points", [_lost(point, f"{point['type']}: {point['error']}") for point in document["failed"]]),
            ("Unfinished points", [_lost(point, UNFINISHED) for point in document["unfinished"]]),
        ],
        footer=html.footer(document["environment"]),
    )  # fmt: skip


def setting(values: Mapping[str, Any]) -> str:
    """Format a configuration's settings.

    >>> setting({"temperature": 4.0, "distillation": "dkd"})
    'temperature=4 distillation=dkd'
    """
    return " ".join(f"{name}={label(value)}" for name, value in values.items()) or "the only configuration"


def sentences(document: Mapping[str, Any]) -> list[str]:
    """Summarise a sweep: the chosen configuration, labels and teacher, and how much the choice matters."""
    found, chosen = document["configurations"], document["chosen"]
    finished = sum(len(entry["points"]) for entry in found)
    counts = f"{finished} points finished, {len(document['failed'])} failed, {len(document['unfinished'])} unfinished."
    if chosen is None:
        return [counts]
    best, title = found[chosen["rank"]], title_of(document)
    seeds = len(best["validation"]["values"])
    lines = [
        f"Best on validation of {len(found)} configurations: {setting(chosen['values'])}, {title} "
        f"{spread(best['validation'])} on validation ({seeds} seed{'s' * (seeds > 1)}) and "
        f"{spread(chosen['test'])} on test."
    ]
    others = []
    if (base := best["baseline"])["mean"] is not None:
        start = "alone" if document["against"] == "baseline" else "with the same start"
        others.append(f"the same student from labels {start} has {spread(base)}")
    if document["teacher"] is not None:
        others.append(f"the teacher {document['teacher']['validation']:.3f}")
    if others:
        lines.append(f"On validation {', '.join(others)}.")
    if best["gain"]["mean"] is not None and best["gain"]["mean"] <= 0:
        lines.append("The chosen configuration is no better than that student: distillation did not help here.")
    return [*lines, *_sensitivity(document, best), counts]


def _sensitivity(document: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
    """Return how far parameters move the score, compared with the seed."""
    found, lines = document["configurations"], []
    moves = [entry for entry in document["parameters"] if not entry["searched"] and len(entry["values"]) > 1]
    if moves:
        moves.sort(key=lambda entry: -entry["moves"])
        listed = ", ".join(f"{entry['name']} {entry['moves']:.3f}" for entry in moves)
        lines.append(f"From worst to best value, averaged over all else, a parameter moves the score by: {listed}.")
    if document["noise"] is not None and len(found) > 1:
        lead = [better_of(document) * (best["validation"]["mean"] - one["validation"]["mean"]) for one in found]
        near = sum(ahead <= document["noise"] for ahead in lead) - 1
        lines.append(
            f"The seed alone moves the score by {document['noise']:.3f} (standard deviation): {near or 'none'} of the "
            f"{len(found) - 1} other configurations {'is' if near == 1 else 'are'} within that of the chosen one, or "
            "better."
        )
    return lines


def _row(document: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return one configuration as the table's texts."""
    entry = document["configurations"][rank]
    gain = entry["gain"]["mean"]
    gain = None if gain is None else round(gain, 3) + 0.0  # no -0.000
    return {
        "cells": [{"text": label(value), "long": len(label(value)) > LETTERS} for value in entry["values"].values()],
        "validation": spread(entry["validation"]),
        "seeds": len(entry["validation"]["values"]),
        "gain": "" if gain is None else f"{gain:+.3f}",
        "below": gain is not None and gain < 0,
        "test": spread(document["chosen"]["test"]) if rank == document["chosen"]["rank"] else "",
        "setting": setting(entry["values"]),
        "points": [
            point | {"title": f"seed {label(point['seed'])}: {point['score']:.4f}, {point['folder']}"}
            for point in entry["points"]
        ],
    }  # fmt: skip


def _lost(point: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {
        "setting": setting(point["values"]), "reason": reason, "traceback": point.get("traceback"),
        "command": point["command"],
    }  # fmt: skip
