"""Several tasks of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_lightning.losses.task_term import TaskTerm
from kd_lightning.losses.term import Term
from kd_lightning.runtime.borders import markdown
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.causal_lm import CausalLanguageModeling
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.details import Details, PartDetails
from kd_lightning.tasks.masked_lm import MaskedLanguageModeling
from kd_lightning.tasks.question_answering import QuestionAnswering
from kd_lightning.tasks.ranking import DESCRIPTION, Ranking
from kd_lightning.tasks.regression import Regression
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.tasks.sentence_embedding import SentenceEmbedding
from kd_lightning.tasks.token_classification import TokenClassification
from kd_lightning.types import Batch, ModelOutput


class MultiTask(Task):
    """Several tasks of one network, whose columns stand side by side among its logits.

    Batches mix examples of all tasks, and `task` `(B,)` is the number of each one's task. Labels are then float32: of a
    classification the numbers of the classes and `IGNORE`, of a regression scores and NaN.

    Args:
        tasks: By name.
        weights: Of the tasks in the loss; 1 where none is given.
    """

    monitor = "average"

    def __init__(self, tasks: Mapping[str, Task], weights: Mapping[str, float] | None = None) -> None:
        self._tasks = dict(tasks)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in tasks}
        ends = accumulate((task.outputs for task in tasks.values()), initial=0)
        self.spans = dict(zip(tasks, (range(start, end) for start, end in pairwise(ends)), strict=True))
        self.outputs = sum(task.outputs for task in tasks.values())

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Its tasks."""
        return self._tasks

    @property
    def specs(self) -> Mapping[str, ScoreSpec]:  # type: ignore[override]
        """How the scores are to be read: `average`, and each task's as `TASK/SCORE`."""
        own = {}
        for name, task in self.tasks.items():
            for score, spec in task.specs.items():
                shown: Literal["always", "never"] = "always" if spec.shown == "always" else "never"
                # of how many examples it is a share no split's size tells
                own[f"{name}/{score}"] = replace(spec, title=f"{name}: {spec.title}", shown=shown, share=False)
        return {"average": ScoreSpec("average over tasks", shown="always"), **own}

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
        """Return each task's scores as `TASK/SCORE`, and `average`, the mean of their monitors."""
        return _TaskScores(self, {name: task.scores() for name, task in self.tasks.items()}, average=True)

    def fidelity(self) -> Scores:
        """Return how near each task's predictions are to its teacher's."""
        return _TaskScores(self, {name: task.fidelity() for name, task in self.tasks.items()})

    def details(self) -> dict[str, Details]:
        """Return each task's own, by its name."""
        return {
            name: PartDetails(inner, number, self.spans[name], task.classes is not None)
            for number, (name, task) in enumerate(self.tasks.items())
            for inner in task.details().values()
        }

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
        return f"It predicts {', '.join(map(markdown, self.tasks))} for every input."

    def predictions(self, logits: Tensor) -> Tensor:
        """Return each task's, side by side as its logits are."""
        return torch.cat([t.predictions(logits[:, self.spans[name]]) for name, t in self.tasks.items()], dim=1)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return each task's prediction, by its name."""
        own = {name: [names[i].removeprefix(f"{name}: ") for i in span] for name, span in self.spans.items()}
        found = [task.read(logits[:, self.spans[name]], rows, own[name]) for name, task in self.tasks.items()]
        return [dict(zip(self.tasks, records, strict=True)) for records in zip(*found, strict=True)]

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return what each task predicts, in a column of its name."""
        return {name: " ".join(task.cells(record[name]).values()) for name, task in self.tasks.items()}

    @property
    def description(self) -> dict[str, Any]:
        """Each task's, by its name."""
        return {name: task.description for name, task in self.tasks.items()}


def task_of(description: int | str | list[str] | dict[str, Any]) -> Task:
    """Return the task that `Task.description` describes.

    >>> task_of({"domain": 4, "rating": "regression"}).outputs
    5
    """
    if description == DESCRIPTION:
        return Ranking()
    if isinstance(description, str):
        kinds = (CausalLanguageModeling, MaskedLanguageModeling, SentenceEmbedding, QuestionAnswering)
        found = (task for kind in kinds if (task := kind.described(description)) is not None)
        return next(found, Regression())
    if isinstance(description, dict):
        return MultiTask({name: task_of(own) for name, own in description.items()})
    if isinstance(description, list):
        return TokenClassification(description)
    return Classification(description)


class _Sum(Term):
    """The weighted sum of terms."""

    uses_teacher = False

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.terms, self.weights = nn.ModuleDict(terms), dict(weights)

    def counts(self, batch: Batch) -> Tensor:
        """Return how many labels the batch has, `(1,)`."""
        return torch.cat([term.counts(batch) for term in self.terms.values()]).sum().view(1)  # type: ignore[operator]

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the sum."""
        parts = [self.weights[name] * term(student, teacher, batch) for name, term in self.terms.items()]
        return torch.stack(parts).sum()


class _TaskScores(Scores):
    """Each task's scores, on its rows and columns.

    Args:
        whole: The tasks.
        tasks: Their scores.
        average: The mean of the scores that tasks are compared by is one, too.
    """

    def __init__(self, whole: MultiTask, tasks: Mapping[str, Scores], average: bool = False) -> None:
        super().__init__({})
        self.whole, self.tasks, self.average = whole, nn.ModuleDict(tasks), average

    @property
    def names(self) -> list[str]:
        """Of the scores: of the whole, and of each task."""
        own = [f"{name}/{score}" for name, scores in self.tasks.items() for score in scores.names]  # type: ignore[union-attr]
        return ["average"] * self.average + own

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch to the scores of the tasks that it has examples of."""
        for number, (name, scores) in enumerate(self.tasks.items()):
            assert isinstance(scores, Scores)
            chosen, span = rows["task"] == number, self.whole.spans[name]
            columns, own = slice(span.start, span.stop), against[chosen]
            own = own[:, columns] if own.ndim == 2 else self.whole.tasks[name].labels(own)
            scores.update(logits[chosen][:, columns], own, {key: value[chosen] for key, value in rows.items()})

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes."""
        found: dict[str, dict[str, Tensor]] = {name: scores.compute() for name, scores in self.tasks.items()}  # type: ignore[operator]
        monitored = (
            [found[name][task.monitor].double() for name, task in self.whole.tasks.items()] if self.average else []
        )
        own = {"average": torch.stack(monitored).mean()} if monitored else {}
        return own | {f"{name}/{score}": value for name, scores in found.items() for score, value in scores.items()}
