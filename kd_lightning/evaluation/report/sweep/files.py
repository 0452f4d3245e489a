"""Writing a sweep's report: `report.html`, its pictures and `sweep.json`, each whole or not at all."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.config.resolvers import folder_name
from kd_lightning.evaluation.report.html import Picture
from kd_lightning.evaluation.report.sweep.build import build_sweep
from kd_lightning.evaluation.report.sweep.page import render, sentences
from kd_lightning.evaluation.report.sweep.points import read_points
from kd_lightning.runtime.borders import json_text
from kd_lightning.runtime.files import remove_temporary, write_file

PAGE, DOCUMENT = "report.html", "sweep.json"
PICTURES = ("heatmap", "scatter", "parameter_", "parallel", "size", "latency")


def report_sweep(folder: Path) -> dict[str, Any]:
    """Read a sweep's points and write its report beside them.

    Args:
        folder: The sweep's folder, with one folder for each point.

    Returns:
        The document of the sweep, as it is in `sweep.json`.

    Raises:
        KDError: There is no such folder, it holds no points, or a file of a point is damaged.
    """
    from kd_lightning.evaluation.report.sweep.pictures import figures

    remove_temporary(folder)

    document = build_sweep(read_points(folder))
    pictures: list[Picture] = []
    drawn: list[Path] = []
    for name, caption, figure in figures(document):
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        pictures.append((caption, picture.getvalue()))
        drawn.append(folder / f"{folder_name(name)}.png")
        write_file(drawn[-1], picture.getvalue())
    for old in {file for name in PICTURES for file in folder.glob(f"{name}*.png")} - set(drawn):
        old.unlink()  # of a report on fewer points
    write_file(folder / DOCUMENT, json_text(document))
    write_file(folder / PAGE, render(document, folder.resolve().name, pictures))
    return document


def headline(document: Mapping[str, Any], folder: Path) -> str:
    """Summarise a sweep in two or three lines, with the path of its report."""
    lines = sentences(document)
    errors = Counter(point["error"] for point in document["failed"])
    lost = [f"{count} failed: {error}" for error, count in errors.items()]
    return "\n".join([*dict.fromkeys([lines[0], lines[-1]]), *lost, f"report: {folder / PAGE}"])
