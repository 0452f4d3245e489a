"""Several tasks of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from kd_lightning.losses.task_term import TaskTerm
from kd_lightning.losses.term import Term
from kd_lightning.runtime.borders import markdown
from kd_lightning.tasks.base import Scores, Task
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.predictions import Answers
from kd_lightning.tasks.regression import Regression
from kd_lightning.types import Batch, ModelOutput


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

    @property
    def parts(self) -> Mapping[str, Task]:
        """Its tasks."""
        return self.tasks

    @property
    def settings(self) -> dict[str, Any]:
        """Its class, its tasks' settings and their weights."""
        tasks = {name: task.settings for name, task in self.tasks.items()}
        return {"_target_": "kd_lightning.tasks.MultiTask", "tasks": tasks, "weights": dict(self.weights)}

    def term(self, name: str, term: Term) -> TaskTerm:
        """Return a loss term for the rows and columns of one task."""
        number, scores = list(self.tasks).index(name), self.tasks[name].classes is None
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
            above = None if teacher is None else teacher[rows, span.start : span.stop]
            found |= {f"{name}/{score}": value for score, value in task.evaluate(self.of(name, said), above).items()}
        mains = [found[f"{name}/{task.main}"] for name, task in self.tasks.items()]
        return {"average": sum(mains) / len(mains)} | found

    def of(self, name: str, said: Answers) -> Answers:
        """Return one task's rows and columns of all tasks' answers."""
        assert said.task is not None
        rows, span = said.task == list(self.tasks).index(name), self.spans[name]
        labels = self.tasks[name].labels(said.labels[rows])
        return Answers(said.index[rows], said.logits[rows, span.start : span.stop], labels)

    def same_label(self, said: Answers, told: Answers) -> Tensor | None:
        """Return it for the examples of every task that has labels, one task after the other."""
        parts = (t.same_label(self.of(name, said), self.of(name, told)) for name, t in self.tasks.items())
        found = [part for part in parts if part is not None]
        return torch.cat(found) if found else None

    def columns(self, names: Sequence[str]) -> str:
        """Return which are whose."""
        parts = [
            f"{markdown(name)}: {'a score' if task.classes is None else 'classes'}, "
            f"column{'s' if len(span) > 1 else ''} {'-'.join(map(str, dict.fromkeys((span[0], span[-1]))))}"
            for (name, task), span in zip(self.tasks.items(), self.spans.values(), strict=True)
        ]
        return f"`logits` has the columns of all tasks ({'; '.join(parts)})."

    def limits(self, names: Sequence[str]) -> str:
        """Return that it predicts for every task."""
        return f"It answers for each of {', '.join(map(markdown, self.tasks))}, whatever it is given."

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
