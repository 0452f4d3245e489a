"""One of C classes an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.term import Term
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.details import ClassDetails, Details
from kd_lightning.tasks.metrics import Accuracy, Agreement, CalibrationError, CrossEntropy, MacroF1, TeacherStudentKL
from kd_lightning.tasks.scores import Scores, ScoreSpec, Values
from kd_lightning.types import IGNORE, Batch

MOST_COLUMNS = 4
"""Of more classes a table shows only the likeliest one's probability."""


class Classification(Task):
    """One of C classes, labelled with its number.

    Args:
        classes: C.
    """

    monitor, calibration, problem_type = "accuracy", "ece", "single_label_classification"
    specs: Mapping[str, ScoreSpec] = {
        "accuracy": ScoreSpec("accuracy", share=True, shown="always"),
        "macro_f1": ScoreSpec("macro F1"),
        "agreement": ScoreSpec("agreement with teacher"),
        "kl_to_teacher": ScoreSpec("KL to teacher, nats", "min"),
        "ece": ScoreSpec("calibration error (ECE)", "min"),
        "cross_entropy": ScoreSpec("cross-entropy, nats", "min", shown="never"),
    }

    def __init__(self, classes: int) -> None:
        self.outputs = self.classes = classes

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and C."""
        return {"_target_": "kd_lightning.tasks.Classification", "classes": self.outputs}

    def labels(self, values: Tensor) -> Tensor:
        """Return them as whole numbers."""
        return values.long()

    def loss(self) -> Term:
        """Return the cross-entropy."""
        return CrossEntropyLoss()

    def scores(self) -> Scores:
        """Return accuracy, macro F1, calibration error and cross-entropy."""
        counted = {"accuracy": Accuracy(self.outputs), "macro_f1": MacroF1(self.outputs)}
        return _ClassScores({**counted, "ece": CalibrationError(), "cross_entropy": CrossEntropy()})

    def fidelity(self) -> Scores:
        """Return agreement with the teacher, and the divergence from it."""
        return Scores({"agreement": Agreement(), "kl_to_teacher": TeacherStudentKL()})

    def details(self) -> dict[str, Details]:
        """Return what is taken for what, calibration, and the examples where the teacher differs."""
        return {"": ClassDetails(self.outputs)}

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the classes' probabilities."""
        return logits.softmax(-1)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the most probable class and all probabilities."""
        refuse_nan(logits)
        return [
            {"label": names[row.index(max(row))], "probabilities": dict(zip(names, row, strict=True))}
            for row in logits.softmax(1).tolist()
        ]

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return the most probable class and all probabilities (only its own above `MOST_COLUMNS`)."""
        chances, label = record["probabilities"], record["label"]
        few = names if len(names) <= MOST_COLUMNS else ()
        found = {f"p({name})": f"{chances[name]:.3f}" for name in few} or {"p": f"{chances[label]:.3f}"}
        return {"label": label, **found}

    @property
    def description(self) -> int:
        """The number of classes."""
        return self.outputs

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return the classes."""
        return labels.astype(np.int64)

    def columns(self, names: Sequence[str]) -> str:
        """Return that they are the classes'."""
        return "`logits` has a column for each class; `export.json` has their names."

    def limits(self, names: Sequence[str]) -> str:
        """Return that it knows its classes only."""
        return f"It knows {', '.join(names)} and nothing else: whatever it is given, it predicts one of them."

    def chance_score(self, labels: Tensor) -> float:
        """Return the share of the most frequent class."""
        return float(labels.bincount().max() / len(labels))


class _ClassScores(Scores):
    """Scores of classes, of which accuracy is a mean over examples."""

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> Values | None:
        """Add a batch. Where the logits are NaN, no class is the label."""
        super().update(logits, against, rows)
        if logits.ndim != 2 or "index" not in rows:
            return None
        right = (logits.argmax(-1) == against) & ~logits.isnan().any(-1)
        return Values(rows["index"], {"accuracy": (right, against != IGNORE)})
