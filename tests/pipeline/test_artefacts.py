"""Reports in W&B and MLflow, without a network."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from kd_lightning.evaluation.report import comparison_rows, write_report
from kd_lightning.pipeline import artefacts
from tests.evaluation.report.examples import FIVE, models, report_of

FILES = {"report.html", "report.json", "report.md", "curves.png", "tradeoff.png"}


def run_with(folder: Path, **loggers: dict[str, Any]) -> tuple[Any, StringIO]:
    output = StringIO()
    console = Console(file=output, width=200)
    return SimpleNamespace(cfg=SimpleNamespace(logger=loggers, name="a"), folder=folder, console=console), output


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    found = report_of(models(**FIVE))
    write_report(found, tmp_path)
    return found


PRIVATE = "my patient's letter"


@pytest.fixture
def private(tmp_path: Path) -> dict[str, Any]:
    """A report with a text, an image and a sample of the test split."""
    one = {"index": 0, "distance": 1.0, "label": 0, "student": [[0, 1.0]], "teacher": [[1, 1.0]]}
    counts = {"labels": [1], "predicted": [1], "right": [1], "confusion": [[1]], "bins": []}
    found = report_of(
        models(**FIVE),
        samples=[{"prompt": PRIVATE, "models": {"distilled": PRIVATE}}],
        details={
            "seed": 0, "student": "distilled",
            "parts": [{"name": "", "class_names": ["neg", "pos"], "models": {"distilled": counts},
                       "apart": [{**one, "text": PRIVATE}, {**one, "png": "UFJJVkFURQ=="}]}],
        },
    )  # fmt: skip
    write_report(found, tmp_path)
    return found


def test_no_example_is_given_to_a_logger(
    private: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, str] = {}

    def keep(logger: CSVLogger, folder: Path, found: Any) -> None:
        given.update({path.name: path.read_bytes().decode(errors="ignore") for path in folder.iterdir()})
        given["the document"] = json.dumps(found)

    monkeypatch.setattr(artefacts, "GIVE", {CSVLogger: keep})
    run, output = run_with(tmp_path, mine={"_target_": "lightning.pytorch.loggers.CSVLogger"})
    artefacts.publish(run, private)
    assert output.getvalue() == ""
    assert given.keys() == FILES | {"the document"}
    assert [name for name, text in given.items() if "patient" in text or "UFJJVkFURQ==" in text] == []
    assert "Confusions" in given["report.html"]
    assert "patient" in (tmp_path / "report.html").read_text(), "the run's own has them"
    assert [path.name for path in (tmp_path / artefacts.FOLDER).iterdir()] == []


def test_a_logger_that_hangs_is_left(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = Event()
    monkeypatch.setattr(artefacts, "GIVE", {CSVLogger: lambda *_: over.wait(60)})
    monkeypatch.setattr(artefacts, "PATIENCE", 0.2)
    run, output = run_with(tmp_path, mine={"_target_": "lightning.pytorch.loggers.CSVLogger"})
    artefacts.publish(run, report)
    over.set()
    assert "alone: logger.mine: not done after 0.2 s: it is not waited for" in output.getvalue()


class Failing:
    """An experiment that cannot be logged to, of either kind."""

    id = "1"

    def __init__(self) -> None:
        self.ended: list[str] = []

    def log(self, *_: Any) -> None:
        raise ConnectionError("no route")

    log_table = log

    def finish(self) -> None:
        self.ended.append("finished")


def test_what_fails_is_ended_in_either_logger(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", MagicMock())
    experiment = Failing()
    with pytest.raises(ConnectionError):
        artefacts._to_wandb(SimpleNamespace(experiment=experiment), tmp_path, report)  # type: ignore[arg-type]
    assert experiment.ended == ["finished"]
    logger = SimpleNamespace(experiment=experiment, run_id="1", finalize=experiment.ended.append)
    with pytest.raises(ConnectionError):
        artefacts._to_mlflow(logger, tmp_path, report)  # type: ignore[arg-type]
    assert experiment.ended == ["finished", "failed"]


def test_wandb_has_the_table_the_pictures_and_the_page(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'kd-lightning[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "p", "offline": True}
    run, output = run_with(tmp_path, wandb=node)
    artefacts.publish(run, report)
    assert output.getvalue() == ""
    [media] = (tmp_path / artefacts.FOLDER).glob("wandb/offline-run-*/files/media")
    [table] = media.glob("table/comparison_*.json")
    written = json.loads(table.read_text())
    assert written["data"] == comparison_rows(report)[1:]
    assert {path.name.split("_")[0] for path in media.glob("images/*.png")} == {"curves", "tradeoff"}
    staged = {path.name for path in tmp_path.rglob("*") if "staged" in path.parts or "staging" in path.parts}
    assert staged, "the files of the artefact wait to be sent"


def test_mlflow_has_the_table_the_pictures_and_the_page(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'kd-lightning[mlflow]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    node = {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "experiment_name": "e"}
    run, output = run_with(tmp_path, mlflow=node)
    artefacts.publish(run, report)
    assert output.getvalue() == ""
    [kept] = (tmp_path / artefacts.FOLDER).glob("*/*/artifacts/report")
    assert {path.name for path in kept.iterdir()} == FILES | {"comparison.json"}
    table = json.loads((kept / "comparison.json").read_text())
    assert table["data"] == comparison_rows(report)[1:]


def test_a_logger_that_fails_is_named_and_others_get_nothing(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def fail(logger: CSVLogger, folder: Path, found: Any) -> None:
        given.append((logger.save_dir, folder.parent, found))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(artefacts, "GIVE", {CSVLogger: fail})
    csv = {"_target_": "lightning.pytorch.loggers.CSVLogger"}
    run, output = run_with(tmp_path, mine=csv, board={"_target_": "lightning.pytorch.loggers.TensorBoardLogger"})
    artefacts.publish(run, report)
    assert given == [(str(tmp_path / artefacts.FOLDER), tmp_path, report)]
    assert output.getvalue() == f"the report is in {tmp_path} alone: logger.mine: no route\n"
