"""Gives a report to loggers of experiments, W&B and MLflow: the table, the pictures, the page.

No test example leaves the machine this way: the report that they get has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from kd_lightning.config.instantiate import build, lookup
from kd_lightning.evaluation.report import PAGE, comparison_rows, write_report
from kd_lightning.evaluation.report.text import captions
from kd_lightning.pipeline.trainer_checks import named
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.files import temporary_folder
from kd_lightning.runtime.limits import PATIENCE, within

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run

FOLDER = "loggers"
"""Where in a run's folder a logger keeps what it does not send."""


def publish(run: Run, report: Mapping[str, Any]) -> None:
    """Give a new report to each logger that takes one, as a run of its own beside those of stages.

    A logger that fails, for want of a network, is named, and the run goes on: its report is in its folder.
    """
    for name, node in run.cfg.logger.items():
        kind = lookup(node["_target_"])
        give = next((GIVE[one] for one in GIVE if isinstance(kind, type) and issubclass(kind, one)), None)
        if give is None:
            continue
        title, place = f"{run.cfg.name} report", run.folder / FOLDER
        try:
            with named(f"logger.{name}"):
                place.mkdir(exist_ok=True)
                logger, sent = build(node, save_dir=str(place), name=title, run_name=title), without_examples(report)
                with temporary_folder(run.folder, "report") as folder:  # every folder in MLflow's is an experiment
                    write_report(sent, folder)
                    within(PATIENCE, partial(give, logger, folder, sent))
        except ConfigError as error:
            say(run.console, f"the report is in {run.folder} alone: {error}")


def without_examples(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without test examples: neither those in `details` nor the beginnings in `samples`."""
    kept = {name: value for name, value in report.items() if name != "samples"}
    if details := report.get("details"):
        kept["details"] = {**details, "parts": [{**part, "apart": []} for part in details["parts"]]}
    return kept


def _table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    heading, *rows = comparison_rows(report)
    return ["measure", *heading[1:]], rows


def _pictures(folder: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the captions of the pictures that there are, by their files' names."""
    return {name: caption for name, caption in captions(report).items() if (folder / name).is_file()}


def _files(folder: Path, report: Mapping[str, Any]) -> Sequence[Path]:
    return [folder / name for name in (PAGE, "report.md", "report.json", *_pictures(folder, report))]


def _to_wandb(logger: WandbLogger, folder: Path, report: Mapping[str, Any]) -> None:
    import wandb

    columns, rows = _table(report)
    pictures = {
        Path(name).stem: wandb.Image(str(folder / name), caption=caption)
        for name, caption in _pictures(folder, report).items()
    }
    experiment: Any = logger.experiment
    try:
        experiment.log({"comparison": wandb.Table(columns=columns, data=rows), **pictures})
        artefact = wandb.Artifact(f"report-{experiment.id}", type="report")
        for file in _files(folder, report):
            artefact.add_file(str(file))
        experiment.log_artifact(artefact)
    finally:
        experiment.finish()


def _to_mlflow(logger: MLFlowLogger, folder: Path, report: Mapping[str, Any]) -> None:
    columns, rows = _table(report)
    client: Any = logger.experiment
    by_column = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
    status = "failed"
    try:
        client.log_table(logger.run_id, by_column, "report/comparison.json")
        for file in _files(folder, report):
            client.log_artifact(logger.run_id, str(file), "report")
        status = "success"
    finally:
        logger.finalize(status)


GIVE: dict[type, Callable[[Any, Path, Mapping[str, Any]], None]] = {WandbLogger: _to_wandb, MLFlowLogger: _to_mlflow}
"""How each kind of logger takes a report."""
