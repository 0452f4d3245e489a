"""One score an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from kd_lightning.losses.regression import RegressionLoss
from kd_lightning.losses.term import Term
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.details import Details, ScoreDetails
from kd_lightning.tasks.metrics import Pearson, RootMeanSquare
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.types import Batch, is_labelled


class Regression(Task):
    """One score, labelled with a float; NaN where there is no label."""

    monitor, outputs, tags, problem_type = "pearson", 1, ("regression",), "regression"
    specs: Mapping[str, ScoreSpec] = {
        "pearson": ScoreSpec("Pearson correlation", shown="always"),
        "rmse": ScoreSpec("RMSE", "min", shown="always"),
        "rmse_to_teacher": ScoreSpec("RMSE to teacher", "min"),
    }

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
        return _Differences({"pearson": Pearson(), "rmse": RootMeanSquare()})

    def fidelity(self) -> Scores:
        """Return the root of the mean squared difference from the teacher."""
        return _Differences({"rmse_to_teacher": RootMeanSquare()}, labels=False)

    def details(self) -> dict[str, Details]:
        """Return the examples where the teacher's score differs most."""
        return {"": ScoreDetails()}

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the score."""
        refuse_nan(logits)
        return [{"score": score} for score in logits.reshape(-1).tolist()]

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return the score."""
        return {"score": f"{record['score']:.3f}"}

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

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch, in float32 whatever it was computed in."""
        predicted, against = logits.reshape(-1).float(), against.reshape(-1).float()
        known = is_labelled(against) if self.labels else slice(None)
        super().update(predicted[known], against[known], rows)
