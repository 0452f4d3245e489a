"""One of C classes an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.term import Term
from kd_lightning.tasks.base import Scores, Task, refuse_nan
from kd_lightning.tasks.metrics import Accuracy, Agreement, MacroF1, TeacherStudentKL, evaluate_logits
from kd_lightning.tasks.predictions import Answers


class Classification(Task):
    """One of C classes, labelled with its number.

    Args:
        classes: C.
    """

    main, problem_type = "accuracy", "single_label_classification"

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
        """Return accuracy and macro F1."""
        return Scores({"accuracy": Accuracy(self.outputs), "macro_f1": MacroF1(self.outputs)})

    def fidelity(self) -> Scores:
        """Return agreement with the teacher, and the divergence from it."""
        return Scores({"agreement": Agreement(), "kl_to_teacher": TeacherStudentKL()})

    def evaluate(self, said: Answers, teacher: Tensor | None = None) -> dict[str, float]:
        """Return what `metrics.evaluate_logits` does."""
        return evaluate_logits(said.logits, said.labels, teacher)

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the classes' probabilities."""
        return logits.softmax(-1)

    def read(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Return the most probable class and all probabilities.

        Raises:
            KDError: There is no most probable class.
        """
        refuse_nan(logits)
        probabilities = logits.softmax(0).tolist()
        label = names[probabilities.index(max(probabilities))]
        return {"label": label, "probabilities": dict(zip(names, probabilities, strict=True))}

    @property
    def description(self) -> int:
        """The number of classes."""
        return self.outputs

    def correct(self, said: Answers) -> list[bool]:
        """Return whether the most probable class is the label; where the logits are NaN there is none."""
        found: list[bool] = ((said.logits.argmax(1) == said.labels) & ~said.logits.isnan().any(1)).tolist()
        return found

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return the classes."""
        return labels.astype(np.int64)

    def same_label(self, said: Answers, told: Answers) -> Tensor:
        """Return whether the most probable class is the same."""
        return said.logits.argmax(1) == told.logits.argmax(1)

    def columns(self, names: Sequence[str]) -> str:
        """Return that they are the classes'."""
        return "`logits` has a column for each class; `export.json` has their names."

    def limits(self, names: Sequence[str]) -> str:
        """Return that it knows its classes only."""
        return f"It knows {', '.join(names)} and nothing else: whatever it is given, it says one of them."

    def guess(self, labels: Tensor) -> float:
        """Return the share of the most frequent class."""
        return float(labels.bincount().max() / len(labels))
