"""One score an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, PearsonCorrCoef

from kd_lightning.losses.regression import RegressionLoss
from kd_lightning.losses.term import Term
from kd_lightning.tasks.base import Scores, Task, refuse_nan
from kd_lightning.tasks.metrics import evaluate_scores
from kd_lightning.tasks.predictions import Answers
from kd_lightning.types import Batch, is_labelled


class Regression(Task):
    """One score, labelled with a float; NaN where there is no label."""

    main, outputs, tags, problem_type = "pearson", 1, ("regression",), "regression"

    @property
    def settings(self) -> dict[str, Any]:
        """Its class."""
        return {"_target_": "kd_lightning.tasks.Regression"}

    def columns(self, names: Sequence[str]) -> str:
        """Return that there is one, the score."""
        return f"`logits` has one column, which is the score ({', '.join(names)}): no softmax, no sigmoid."

    def limits(self, names: Sequence[str]) -> str:
        """Return that its scores are unbounded."""
        return f"It gives a number ({', '.join(names)}) for whatever it is given, in no fixed range."

    def loss(self) -> Term:
        """Return the mean squared error."""
        return RegressionLoss(target="labels")

    def scores(self) -> Scores:
        """Return Pearson's correlation and the root of the mean squared error."""
        return _Differences({"pearson": PearsonCorrCoef(), "rmse": MeanSquaredError(squared=False)})

    def fidelity(self) -> Scores:
        """Return the root of the mean squared difference from the teacher."""
        return _Differences({"rmse_to_teacher": MeanSquaredError(squared=False)}, labels=False)

    def evaluate(self, said: Answers, teacher: Tensor | None = None) -> dict[str, float]:
        """Return what `metrics.evaluate_scores` does."""
        return evaluate_scores(said.logits, said.labels, teacher)

    def read(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Return the score.

        Raises:
            KDError: It is NaN.
        """
        refuse_nan(logits)
        return {"score": float(logits)}

    @property
    def description(self) -> str:
        """Its name."""
        return "regression"


class _Differences(Scores):
    """Scores of one number an example.

    Args:
        metrics: By name.
        labels: They are against labels, and over those examples that have one.
    """

    def __init__(self, metrics: Mapping[str, Metric], labels: bool = True) -> None:
        super().__init__(metrics)
        self.labels = labels

    def forward(self, logits: Tensor, against: Tensor, batch: Batch) -> dict[str, Metric]:
        """Add a batch, in float32 whatever it was computed in."""
        said, against = logits.reshape(-1).float(), against.reshape(-1).float()
        if self.labels:
            known = is_labelled(against)
            said, against = said[known], against[known]
        return super().forward(said, against, batch) if len(said) else dict(self.metrics)  # type: ignore[arg-type]
