"""The protocol of tasks: what is predicted, what losses and scores compare, and how to read both.

Everything that depends on what is predicted belongs to the task. A batch goes through a training so:

| | an example has one row | its tokens have one each |
|---|---|---|
| `ModelOutput.logits` | `(B, C)` | `(B, L, C)` |
| `compared(batch)["labels"]` | `(B,)`: one for each row of the logits | `(B, L)` |
| `compared(batch)["keep"]` | absent: every row counts | `(B, L)` bool: the rows that count |

A loss or a score over tokens is that of the kept rows in line, `logits[keep]` `(N, C)` and `labels[keep]` `(N,)`; what
stands in other rows reaches neither value nor gradient. Only where logits are of starts and ends of spans, `(B, L, 2)`,
distributions are over an example's kept rows (`QuestionAnswering`). Where few tokens of a text are predicted, logits
are of these alone, `(B, M, C)`, and so are labels and `keep` (`MaskedLanguageModeling`). The logits are never cut or
shifted: where a row predicts another token than its own (`next_tokens`), labels and `keep` move to it.
`attention_mask` stays as it is, for losses on hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks.details import Details
from kd_lightning.tasks.scores import Mode, Scores, ScoreSpec
from kd_lightning.types import Batch


class Task(ABC):
    """What a network predicts.

    Attributes:
        monitor: The score by which checkpoints are selected and models compared.
        calibration: The score that measures how wrong its probabilities are; None where it has none.
        specs: How the scores are to be read, those against labels and those against a teacher.
        outputs: How many numbers a network puts out for it.
        classes: C, where it is one of C classes; None where what is predicted has no probabilities.
        unit: What is drawn independently, and so what errors of scores are by.
        learns_from: What a network learns from without a teacher.
        per_token: Whether a network predicts for each token of a text, and not for the text.
        in_context: Whether a text is a question, and what is predicted a span of the context that comes with it.
        complete: Whether it has all that its scores read; otherwise the data's own task has.
        input_columns: What a table's columns of inputs are called, by the options that name them.
        embeds: Whether what it predicts of a text is a vector to compare it by.
        generates: Whether what it predicts of a text is how it goes on (`kd_lightning.evaluation.generation`).
        fills: Whether what it predicts of a text are the tokens at its masks (`kd_lightning.evaluation.masks`).
        kept: Which of a checkpoint's classes there are, where it has more; None: all.
    """

    monitor: str
    calibration: str | None = None
    specs: Mapping[str, ScoreSpec]
    outputs: int
    classes: int | None = None
    unit: str = "example"
    learns_from: str = "labels"
    per_token: bool = False
    in_context: bool = False
    complete: bool = True
    input_columns: Mapping[str, str] = {}
    embeds: bool = False
    generates: bool = False
    fills: bool = False
    kept: Any = None

    @property
    def mode(self) -> Mode:
        """Whether more or less of `monitor` is better."""
        return self.specs[self.monitor].mode

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks that it consists of, by name; none where it is one."""
        return {}

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What builds this task again: its `_target_` and arguments."""

    def compared(self, batch: Batch) -> Batch:
        """Return the batch with what is compared: a label and `keep` for each row."""
        return batch

    def check_logits(self, logits: Tensor, batch: Batch) -> None:
        """Refuse a network that predicts something else.

        Raises:
            ConfigError: Names the logits' shape and what it should be.
        """
        if logits.ndim != 2 or logits.shape[1] != self.outputs:
            raise ConfigError(
                f"it predicts logits of shape {list(logits.shape)} for {len(logits)} examples, and the data need "
                f"{self.outputs} an example: a network gives one logit for each class, also of two"
            )

    def labels(self, values: Tensor) -> Tensor:
        """Return labels `(B,)` of several tasks' common type as this task's own."""
        return values

    def finished(self, checkpoint: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load a network of Hugging Face that was trained for this task.

        Args:
            checkpoint: A folder or a name.
            sizes: What the data fix of a network, by the names of constructors' arguments.

        Raises:
            ConfigError: It is none, or for other data.
        """
        from kd_lightning.models.hf import finished  # imports the models of transformers

        return finished(checkpoint, self.outputs, sizes.get("pad_token_id"))

    def published(self, network: nn.Module) -> nn.Module:
        """Return a network of transformers as the class that is expected for this task there."""
        return network

    def as_published(self, folder: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load what `published` returned with that class; arguments as for `finished`."""
        return self.finished(folder, sizes)

    @abstractmethod
    def loss(self) -> Term:
        """Return how it is learned from labels."""

    def terms(self) -> tuple[dict[str, Term], dict[str, float]]:
        """Return `loss` as terms and their weights."""
        return {"labels": self.loss()}, {"labels": 1.0}

    @abstractmethod
    def scores(self) -> Scores:
        """Return the scores against labels; `monitor` is among them."""

    @abstractmethod
    def fidelity(self) -> Scores:
        """Return the scores against a teacher's logits."""

    def details(self) -> dict[str, Details]:
        """Return what a report shows beside scores, by part of the task; the whole's name is empty."""
        return {}

    def predictions(self, logits: Tensor) -> Tensor:
        """Return logits `(B, C)` as predictions: scores as they are, and the probabilities of classes."""
        return logits

    @abstractmethod
    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return in plain values what is predicted for each example.

        Args:
            logits: `(B, C)` or `(B, L, C)`.
            rows: The batch that they are of.
            names: The data's `class_names`.

        Raises:
            KDError: A logit that counts is NaN: it predicts nothing.
        """

    @abstractmethod
    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return what a table shows of one example that `read` returned, by column."""

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return in which proportion folds are to be alike: a number for each of the labels `(N,)`."""
        return np.zeros(len(labels), np.int64)

    def prompts(self, batch: Batch, tokens: int, every: bool = False) -> list[Tensor]:
        """Return the beginnings of a batch's texts, `(L,)` each, that one who `generates` goes on with.

        Args:
            batch: A batch of the data.
            tokens: The most of a beginning, where it is not the data that say where one ends.
            every: Where they do, all beginnings of a text, and not the first alone.
        """
        return []

    # -- what an export tells of it -----------------------------------------------------------------------------------

    @abstractmethod
    def columns(self, names: Sequence[str]) -> str:
        """Return a sentence about the columns of the logits; `names` are the data's, fit for Markdown."""

    @abstractmethod
    def limits(self, names: Sequence[str]) -> str:
        """Return a sentence about what it cannot predict."""

    tags: tuple[str, ...] = ()
    """By which the hub finds it, besides those of every student."""

    def pipeline(self, reads: str) -> str | None:
        """Return the hub's name of the task for a model of `text` or `image`; None where it has none."""
        return f"{reads}-classification" if self.problem_type else None  # regressions too

    problem_type: str | None = None
    """What transformers' classifiers call it; None where no class of transformers predicts it."""

    @property
    @abstractmethod
    def description(self) -> Any:
        """What `task_of` makes this task of again, as JSON can hold it."""

    def chance_score(self, labels: Tensor) -> float | None:
        """Return the `monitor` score of the best constant prediction for labels `(N,)`, if any."""
        return None


def refuse_nan(logits: Tensor) -> None:
    """Raise `KDError` where logits are NaN: they predict nothing."""
    if logits.isnan().any():
        raise KDError("the network predicts NaN, which is no class and no score: its weights or this input are damaged")
