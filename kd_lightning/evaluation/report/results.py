"""The input of a report: plain data, one `ModelResult` per model."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.errors import DataError

if TYPE_CHECKING:  # their modules import torch
    from kd_lightning.evaluation.generated import Draft, Generation
    from kd_lightning.evaluation.profiling import Latency, Size, Throughput
    from kd_lightning.tasks import ScoreSpec
    from kd_lightning.tasks.scores import UnitSums

MODEL_NAMES = ("teacher", "assistant", "untrained", "baseline", "baseline_initialised", "distilled", "finetuned")
"""Every model a report knows, in the order of tables and pictures; assistants are numbered: assistant_1, ..."""

LOSS_SHARE, GRADIENT_SHARE = "train/share/", "train/gradient/share/"
"""Prefixes of those columns, before a term's name."""

_log = logging.getLogger(__name__)


def role(name: str) -> str:
    """Return which of `MODEL_NAMES` a model's name is.

    >>> role("assistant_2"), role("distilled")
    ('assistant', 'distilled')
    """
    return "assistant" if name.startswith("assistant_") else name


def score_title(document: Mapping[str, Any], name: str | None = None) -> str:
    """Return how people read a score of a report or a sweep; by default that by which models are compared.

    >>> score_title({"scores": {"pearson": {"title": "Pearson correlation"}}}, "pearson")
    'Pearson correlation'
    """
    title: str = document["scores"][name or document["data"]["monitor"]]["title"]
    return title


def monitor(report: Mapping[str, Any]) -> str:
    """Return the name of the score by which a report compares models."""
    name: str = report["data"]["monitor"]
    return name


def sign(document: Mapping[str, Any], name: str) -> int:
    """Return 1 where more of a score is better, -1 where less is."""
    return 1 if document["scores"][name]["mode"] == "max" else -1


@dataclass(frozen=True)
class Curve:
    """The learning curves of one training.

    Attributes:
        seed: The run's seed.
        score: The score on validation by which models are compared, by optimizer step, in order.
        loss: Training loss by optimizer step.
        loss_share: Each term's share of the weighted loss by optimizer step; empty for a training from labels.
        gradient_share: Each term's share of the gradient, likewise.
    """

    seed: int
    score: dict[int, float]
    loss: dict[int, float]
    loss_share: dict[str, dict[int, float]] = field(default_factory=dict)
    gradient_share: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputsTime:
    """For how long a teacher predicted what its students learn from and are compared with.

    Attributes:
        total: Seconds: before, during and after trainings.
        reused: The part of it that other runs spent, whose stored outputs this one read.
        training: The part of it within the training time of this run's students.
    """

    total: float
    reused: float = 0.0
    training: float = 0.0


@dataclass(frozen=True)
class ModelResult:
    """One model of the comparison.

    Lists have one entry per seed, in the order of the run's seeds; those of a teacher, an assistant and the untrained
    student have one.

    Attributes:
        name: Which model: one of `MODEL_NAMES`.
        title: Its title, such as "student from labels".
        test: Scores on the test split, as `tasks.evaluation.evaluate` returns them.
        validation: The same on the validation split.
        size: Parameters and bytes.
        latency: One example at a time.
        throughput: Whole batches.
        generation: One text at a time, of a language model.
        draft: What it is worth as the teacher's draft model.
        training_seconds: Wall time of training; empty for a model that was loaded.
        curves: Learning curves; empty for a model that was loaded.
        units: For each seed, what each test example or document adds to the scores that are means, in the same order
            for all models. It allows a paired comparison of two models, which detects smaller differences.
        outputs_seconds: What its predictions took, of one that teaches.
    """

    name: str
    title: str
    test: Sequence[Mapping[str, float]]
    validation: Sequence[Mapping[str, float]] = ()
    size: Size | None = None
    latency: Latency | None = None
    throughput: Throughput | None = None
    generation: Generation | None = None
    draft: Draft | None = None
    training_seconds: Sequence[float] = ()
    curves: Sequence[Curve] = ()
    units: Sequence[Mapping[str, UnitSums]] = ()
    outputs_seconds: OutputsTime | None = None


@dataclass(frozen=True)
class DataSummary:
    """The data of a run.

    Attributes:
        name: The data set.
        splits: Number of examples by split; at least `test`, usually `train`, `validation`, and `views` and `transfer`
            if used.
        chance_score: The score, by which models are compared, of the best constant prediction on the test split; None
            where there is none.
        class_names: Names of the classes.
        fingerprint: Hash of content and preprocessing.
        monitor: The score by which checkpoints are selected and models compared.
        specs: How each score is to be read, by name.
        calibration: The score that measures how wrong probabilities are; None where there is none.
        unit: What is drawn independently: an `example`, or a `document` of many tokens.
        learns_from: What a student has without a teacher.
    """

    name: str
    splits: Mapping[str, int]
    chance_score: float | None
    monitor: str
    specs: Mapping[str, ScoreSpec]
    class_names: Sequence[str] = field(default=())
    fingerprint: str | None = None
    calibration: str | None = None
    unit: str = "example"
    learns_from: str = "labels"


def read_curve(path: str | Path, seed: int, *, score_key: str, loss_key: str = "train/loss") -> Curve:
    """Read a learning curve from the `metrics.csv` of Lightning's `CSVLogger`.

    Its rows are sparse: each holds what was logged together at one step, the other cells are empty. A step that occurs
    twice (a resumed run logs the steps after its checkpoint again) counts with its last value. A row cut short by a
    kill is skipped with a logged warning; a file that a kill left empty has no rows.

    Args:
        path: The CSV file.
        seed: Seed of that run.
        score_key: Column of the score on validation.
        loss_key: Column of the training loss; `<loss_key>_step` is used if Lightning wrote that instead.

    Returns:
        The curve; empty if a column is missing.

    Raises:
        DataError: If there is no such file or it has no `step` column.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the metrics.csv that Lightning's CSVLogger writes")
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        if not columns:  # a kill came between the file and its first line
            return Curve(seed, {}, {})
        if "step" not in columns:
            raise DataError(
                f"{path}: no column 'step'; expected Lightning's metrics.csv, found columns {list(columns)}"
            )
        if loss_key not in columns:
            loss_key = f"{loss_key}_step"
        shares = [key for key in columns if key.startswith((LOSS_SHARE, GRADIENT_SHARE))]
        found: dict[str, dict[int, float]] = {key: {} for key in (score_key, loss_key, *shares)}
        for row in rows:
            try:
                step = int(row["step"])
                # None stands in cells (and as a key) where a row has too few (too many) of them
                for key, values in found.items():
                    if row.get(key):
                        values[step] = float(row[key])
            except (TypeError, ValueError):
                _log.warning("%s, line %d: skipped a damaged row", path, rows.line_num)
    found = {key: dict(sorted(values.items())) for key, values in found.items()}
    by_term = [
        {key.removeprefix(prefix): found[key] for key in shares if key.startswith(prefix)}
        for prefix in (LOSS_SHARE, GRADIENT_SHARE)
    ]
    return Curve(seed, found[score_key], found[loss_key], *by_term)


def read_curves(folder: Path, seed: int, score: str) -> Curve:
    """Read a stage's learning curve; a resumed training has one log per attempt, the later counts."""
    curve = Curve(seed, {}, {})
    for log in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda log: int(log.parent.name.split("_")[1])):
        part = read_curve(log, seed, score_key=f"val/{score}")
        curve.score.update(part.score)
        curve.loss.update(part.loss)
        for known, new in ((curve.loss_share, part.loss_share), (curve.gradient_share, part.gradient_share)):
            for term, values in new.items():
                known.setdefault(term, {}).update(values)
    return curve
