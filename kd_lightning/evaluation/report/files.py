"""Reads and writes the report's files atomically."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.evaluation.report.build import SCHEMA_VERSION
from kd_lightning.evaluation.report.text import report_markdown
from kd_lightning.runtime.errors import DataError, KDError
from kd_lightning.runtime.files import write_file
from kd_lightning.runtime.seals import read_sealed, sealed_text


def write_report(report: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.json`, `report.md`, `curves.png`, `tradeoff.png` and, with shares, `shares.png`.

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
    from kd_lightning.evaluation.report.pictures import curves_figure, shares_figure, tradeoff_figure

    folder = Path(folder)
    contents: dict[str, bytes] = {}
    for name, draw in (("curves", curves_figure), ("tradeoff", tradeoff_figure), ("shares", shares_figure)):
        figure = draw(report)
        if figure is not None:
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
            contents[f"{name}.png"] = picture.getvalue()
    contents["report.json"] = sealed_text(report).encode()
    contents["report.md"] = report_markdown(report, pictures=tuple(contents)).encode()
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
