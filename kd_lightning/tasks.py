"""What a network predicts: how many numbers it puts out, how it learns them from labels, and how it is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, PearsonCorrCoef

from kd_lightning.errors import KDError
from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.regression import RegressionLoss
from kd_lightning.losses.task import TaskTerm
from kd_lightning.losses.term import Term
from kd_lightning.metrics import Accuracy, Agreement, MacroF1, TeacherStudentKL, evaluate_logits, evaluate_scores
from kd_lightning.models.answers import Answers
from kd_lightning.types import Batch, ModelOutput, is_labelled


class Scores(nn.Module):
    """Scores that are accumulated over the batches of a validation.

    Args:
        metrics: By name.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(metrics)

    @property
    def names(self) -> list[str]:
        """Under which they are logged."""
        return list(self.metrics)

    def forward(self, logits: Tensor, against: Tensor, batch: Batch) -> dict[str, Metric]:
        """Add a batch and return the metrics, to be logged.

        Args:
            logits: `(B, C)`.
            against: Labels `(B,)`, or a teacher's logits `(B, C)`.
            batch: The batch itself.
        """
        for metric in self.metrics.values():
            metric.update(logits, against)  # type: ignore[operator]
        return dict(self.metrics)  # type: ignore[arg-type]


class Task(ABC):
    """What a network predicts.

    Attributes:
        main: The score by which checkpoints are selected and models compared; higher is better.
        outputs: How many numbers a network puts out for it.
    """

    main: str
    outputs: int

    def labels(self, values: Tensor) -> Tensor:
        """Return labels `(B,)` of several tasks' common type as this task's own."""
        return values

    @abstractmethod
    def loss(self) -> Term:
        """Return how it is learned from labels."""

    def terms(self) -> tuple[dict[str, Term], dict[str, float]]:
        """Return `loss` as terms and their weights."""
        return {"labels": self.loss()}, {"labels": 1.0}

    @abstractmethod
    def scores(self) -> Scores:
        """Return what validation looks at against the labels; `main` is among them."""

    @abstractmethod
    def fidelity(self) -> Scores:
        """Return what validation looks at against the teacher's logits."""

    @abstractmethod
    def evaluate(self, said: Answers, teacher: Tensor | None = None) -> dict[str, float]:
        """Return every score of the report; with the teacher's logits `(N, C)`, how near it is to the teacher too."""

    def predictions(self, logits: Tensor) -> Tensor:
        """Return in numbers what logits `(B, C)` say: scores as they are, and the probabilities of classes."""
        return logits

    @abstractmethod
    def read(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Return in plain values what the logits `(C,)` of one example say; `names` are the data's `class_names`."""

    @property
    @abstractmethod
    def description(self) -> Any:
        """What `task_of` makes this task of again, as JSON can hold it."""

    def correct(self, said: Answers) -> list[bool]:
        """Return whether each example is predicted rightly; nothing where that is no matter of right and wrong."""
        return []

    def guess(self, labels: Tensor) -> float | None:
        """Return the main score of the best constant answer; None where it has none."""
        return None


class Classification(Task):
    """One of C classes, labelled with its number.

    Args:
        classes: C.
    """

    main = "accuracy"

    def __init__(self, classes: int) -> None:
        self.outputs = classes

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
        _refuse_nan(logits)
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

    def guess(self, labels: Tensor) -> float:
        """Return the share of the most frequent class."""
        return float(labels.bincount().max() / len(labels))


class Regression(Task):
    """One score, labelled with a float; NaN where there is no label."""

    main, outputs = "pearson", 1

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
        _refuse_nan(logits)
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


class MultiTask(Task):
    """Several tasks of one network, whose columns stand side by side among its logits.

    Batches mix examples of all tasks, and `task` `(B,)` says which each is of. Labels are then float32: of a
    classification the numbers of the classes and `IGNORE`, of a regression scores and NaN.

    Args:
        tasks: By name.
        weights: Of the tasks in the loss; 1 where none is given.
    """

    main = "average"

    def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float] | None = None) -> None:
        self.tasks = dict(tasks)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in tasks}
        ends = accumulate((task.outputs for task in tasks.values()), initial=0)
        self.spans = dict(zip(tasks, (range(start, end) for start, end in pairwise(ends)), strict=True))
        self.outputs = sum(task.outputs for task in tasks.values())

    def term(self, name: str, term: Term) -> TaskTerm:
        """Return a loss term for the rows and columns of one task."""
        number, scores = list(self.tasks).index(name), isinstance(self.tasks[name], Regression)
        return TaskTerm(term, name, number, self.spans[name], scores)

    def terms(self) -> tuple[dict[str, Term], dict[str, float]]:
        """Return the tasks' own losses, each over the examples of its task."""
        return {name: self.term(name, task.loss()) for name, task in self.tasks.items()}, self.weights

    def loss(self) -> Term:
        """Return the weighted sum of the tasks' own losses."""
        return _Sum(*self.terms())

    def scores(self) -> Scores:
        """Return each task's scores, and the average of their main ones."""
        parts = {name: task.scores() for name, task in self.tasks.items()}
        average = _Average([parts[name].metrics[task.main] for name, task in self.tasks.items()])  # type: ignore[misc]
        return _TaskScores(parts, self, {"average": average})

    def fidelity(self) -> Scores:
        """Return how near each task's answers are to its teacher's."""
        return _TaskScores({name: task.fidelity() for name, task in self.tasks.items()}, self, {})

    def evaluate(self, said: Answers, teacher: Tensor | None = None) -> dict[str, float]:
        """Return each task's scores, named `TASK/SCORE`, and `average`, the mean of their main ones."""
        assert said.task is not None
        found: dict[str, float] = {}
        for number, (name, task) in enumerate(self.tasks.items()):
            rows, span = said.task == number, self.spans[name]
            own = Answers(said.index[rows], said.logits[rows, span.start : span.stop], task.labels(said.labels[rows]))
            above = None if teacher is None else teacher[rows, span.start : span.stop]
            found |= {f"{name}/{score}": value for score, value in task.evaluate(own, above).items()}
        mains = [found[f"{name}/{task.main}"] for name, task in self.tasks.items()]
        return {"average": sum(mains) / len(mains)} | found

    def predictions(self, logits: Tensor) -> Tensor:
        """Return each task's, side by side as its logits are."""
        return torch.cat([t.predictions(logits[:, self.spans[name]]) for name, t in self.tasks.items()], dim=1)

    def read(self, logits: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Return what each task's logits say, by its name."""
        own = {name: [names[i].removeprefix(f"{name}: ") for i in span] for name, span in self.spans.items()}
        return {name: task.read(logits[list(self.spans[name])], own[name]) for name, task in self.tasks.items()}

    @property
    def description(self) -> dict[str, Any]:
        """Each task's, by its name."""
        return {name: task.description for name, task in self.tasks.items()}


def _refuse_nan(logits: Tensor) -> None:
    if logits.isnan().any():
        raise KDError("the network predicts NaN, which is no class and no score: its weights or this input are damaged")


def task_of(description: int | str | dict[str, Any]) -> Task:
    """Return the task that `Task.description` describes.

    >>> task_of({"domain": 4, "rating": "regression"}).outputs
    5
    """
    if isinstance(description, dict):
        return MultiTask({name: task_of(own) for name, own in description.items()})
    return Classification(description) if isinstance(description, int) else Regression()


class _Sum(Term):
    """The weighted sum of terms."""

    uses_teacher = False

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.terms, self.weights = nn.ModuleDict(terms), dict(weights)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the sum."""
        parts = [self.weights[name] * term(student, teacher, batch) for name, term in self.terms.items()]
        return torch.stack(parts).sum()


class _TaskScores(Scores):
    """Each task's scores, on its rows and columns."""

    def __init__(self, parts: Mapping[str, Scores], whole: MultiTask, more: Mapping[str, Metric]) -> None:
        super().__init__(more)
        self.parts, self.whole = nn.ModuleDict(parts), whole

    @property
    def names(self) -> list[str]:
        """Those of the whole, and of each task as `TASK/SCORE`."""
        return [*self.metrics, *(f"{name}/{score}" for name, part in self.parts.items() for score in part.names)]  # type: ignore[union-attr]

    def forward(self, logits: Tensor, against: Tensor, batch: Batch) -> dict[str, Metric]:
        """Add a batch."""
        found = super().forward(logits, against, batch)
        for number, (name, part) in enumerate(self.parts.items()):
            assert isinstance(part, Scores)
            rows, span = batch["task"] == number, self.whole.spans[name]
            if rows.any():
                columns = slice(span.start, span.stop)
                own = against[rows]
                own = own[:, columns] if own.ndim == 2 else self.whole.tasks[name].labels(own)
                part(logits[rows][:, columns], own, batch)
            found |= {f"{name}/{score}": metric for score, metric in part.metrics.items()}  # type: ignore[misc]
        return found


class _Average(Metric):
    """The mean of other metrics' values."""

    full_state_update = False

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__()
        self.metrics = nn.ModuleList(metrics)

    def update(self, *_: Any) -> None:
        """Do nothing: the metrics are given batches of their own."""

    def compute(self) -> Tensor:
        """Return the mean."""
        return torch.stack([torch.as_tensor(metric.compute()).float() for metric in self.metrics]).mean()  # type: ignore[operator]
