"""What a run hands over to be reported: plain data, one `ModelResult` per model."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kd_lightning.errors import DataError

if TYPE_CHECKING:  # they live beside code that needs torch
    from kd_lightning.measure import Latency, Size, Throughput

ModelName = Literal["teacher", "baseline", "baseline_initialised", "distilled", "finetuned"]

MODEL_NAMES: tuple[ModelName, ...] = ("teacher", "baseline", "baseline_initialised", "distilled", "finetuned")
"""Every model a report knows, in the order of tables and pictures."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curve:
    """How one training run went.

    Attributes:
        seed: The run's seed.
        accuracy: Validation accuracy by optimizer step, in the order of the steps.
        loss: Training loss by optimizer step.
    """

    seed: int
    accuracy: dict[int, float]
    loss: dict[int, float]


@dataclass(frozen=True)
class ModelResult:
    """One model of the comparison.

    Lists have one entry per seed, in the order of the run's seeds; the teacher's have one.

    Attributes:
        name: Which model.
        title: How people read it, such as "student from labels".
        test: Scores on the test split, as `metrics.evaluate_logits` returns them.
        validation: The same on the validation split.
        size: Parameters and bytes.
        latency: One example at a time.
        throughput: Whole batches.
        training_seconds: Wall time of training; empty for a model that was loaded.
        curves: Learning curves; empty for a model that was loaded.
        correct: For each seed, whether each test example was predicted rightly, in the same order for all models. With
            it the difference between two models is judged on the same examples (paired), which sees smaller
            differences.
    """

    name: ModelName
    title: str
    test: Sequence[Mapping[str, float]]
    validation: Sequence[Mapping[str, float]] = ()
    size: Size | None = None
    latency: Latency | None = None
    throughput: Throughput | None = None
    training_seconds: Sequence[float] = ()
    curves: Sequence[Curve] = ()
    correct: Sequence[Sequence[bool]] = ()


@dataclass(frozen=True)
class DataSummary:
    """What the models were trained and tested on.

    Attributes:
        name: The data set.
        splits: Number of examples by split; at least `test`, usually `train`, `validation`, and `views` and `transfer`
            where used.
        majority_accuracy: Accuracy on the test split of always answering its most frequent class.
        class_names: Names of the classes.
        fingerprint: Hash of content and preprocessing.
    """

    name: str
    splits: Mapping[str, int]
    majority_accuracy: float
    class_names: Sequence[str] = field(default=())
    fingerprint: str | None = None


def read_curve(
    path: str | Path, seed: int, *, accuracy_key: str = "val/accuracy", loss_key: str = "train/loss"
) -> Curve:
    """Read a learning curve from the `metrics.csv` of Lightning's `CSVLogger`.

    Its rows are sparse: each holds what was logged together at one step, the other cells are empty. A step that occurs
    twice (a resumed run logs the steps after its checkpoint again) counts with its last value. A row cut short by a
    kill is skipped with a logged warning.

    Args:
        path: The CSV file.
        seed: Seed of that run.
        accuracy_key: Column of the validation accuracy.
        loss_key: Column of the training loss; `<loss_key>_step` is taken when Lightning wrote that instead.

    Returns:
        The curve; empty where a column is missing.

    Raises:
        DataError: If there is no such file or it has no `step` column.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the metrics.csv that Lightning's CSVLogger writes")
    accuracy: dict[int, float] = {}
    loss: dict[int, float] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        if "step" not in columns:
            raise DataError(
                f"{path}: no column 'step'; expected Lightning's metrics.csv, found columns {list(columns)}"
            )
        if loss_key not in columns:
            loss_key = f"{loss_key}_step"
        for row in rows:
            try:
                step = int(row["step"])
                # None stands in cells (and as a key) where a row has too few (too many) of them
                for key, values in ((accuracy_key, accuracy), (loss_key, loss)):
                    if row.get(key):
                        values[step] = float(row[key])
            except (TypeError, ValueError):
                _log.warning("%s, line %d: skipped a damaged row", path, rows.line_num)
    return Curve(seed=seed, accuracy=dict(sorted(accuracy.items())), loss=dict(sorted(loss.items())))
