"""Reads and writes the report's files atomically."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.evaluation.report.build import SCHEMA_VERSION
from kd_lightning.evaluation.report.page import run_page
from kd_lightning.evaluation.report.text import captions, report_markdown
from kd_lightning.runtime.errors import DataError, KDError
from kd_lightning.runtime.files import write_file
from kd_lightning.runtime.seals import read_sealed, sealed_text

PAGE = "report.html"
"""The page of a run."""


def write_report(report: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.json`, `report.md`, `report.html` and the pictures that the report has figures for.

    Everything is rendered before the first file is touched, and each file replaces its predecessor in one step: a
    failure leaves the old report as it was.

    Args:
        report: The document `build_report` returns.
        folder: Created if missing.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: If the report holds nan or infinity (`build_report` leaves none).
    """
    from kd_lightning.evaluation.report.pictures import FIGURES

    folder = Path(folder)
    contents: dict[str, bytes] = {}
    for name, draw in FIGURES.items():
        figure = draw(report)
        if figure is not None:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
            contents[name] = picture.getvalue()
    titles = captions(report)
    page = run_page(report, [(titles[name], picture) for name, picture in contents.items()])
    contents["report.json"] = sealed_text(report).encode()
    contents[PAGE] = page.encode()
    contents["report.md"] = report_markdown(report, pictures=tuple(FIGURES.keys() & contents.keys())).encode()
    for name, content in contents.items():
        write_file(folder / name, content)
    return folder / "report.md"


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a `report.json` (or the one in a run's folder).

    Raises:
        DataError: If it is missing, is not JSON, or has another schema version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    if not path.is_file():
        raise DataError(f"{path}: no such report; a finished kd-train run writes one")
    try:
        report = read_sealed(path, "remove it and run the same kd-train again, which writes it again", required=False)
    except KDError as error:
        raise DataError(str(error)) from error
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version!r}, this kd_lightning reads {SCHEMA_VERSION}")
    return report
