"""One task of several: any term on logits, applied to the rows and columns of its task."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.term import Depth, Term
from kd_lightning.types import Batch, ModelOutput


class TaskTerm(Term):
    r"""A term on the logits of one task, in batches that mix the examples of several.

    The batch's `task` `(B,)` gives each example's task, and each task has its own columns among the
    logits `(B, C_1 + ... + C_K)`. With B_k rows of this task and the term's value :math:`L_k` on them alone, this is

    .. math:: \frac{B_k}{B} L_k

    so that the sum over all tasks is a mean over the batch: an example counts alike whatever its task, and how much a
    task counts is decided by how often it is drawn, and by its weight. A batch without the task gives 0 with a graph.

    Args:
        term: One that uses only logits and labels.
        name: Of the task, for messages.
        number: Of the task in the batch's `task`.
        columns: The task's.
        scores: The labels are scores, kept as floats; otherwise they are classes.

    Raises:
        ValueError: When planned, a term that reads features; in `forward`, whatever the term refuses, with the name.
    """

    def __init__(self, term: Term, name: str, number: int, columns: range, scores: bool = False) -> None:
        super().__init__()
        self.term, self.name, self.number, self.scores = term, name, number, scores
        self.columns = slice(columns.start, columns.stop)
        self.uses_teacher = term.uses_teacher

    def plan(self, student: Depth, teacher: Depth) -> None:
        """Refuse a term that uses features: only logits can be separated by task."""
        self.term.plan(student, teacher)
        if read := sorted({*self.term.needs_student, *self.term.needs_teacher}):
            raise ValueError(f"reads {', '.join(read)}: with several tasks, only logits can be separated")

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Let the term build what it sizes by the task's logits."""
        self.term.connect(self._of(student, slice(None)), self._of(teacher, slice(None)), examples)

    def counts(self, batch: Batch) -> Tensor:
        """Return what the term counts among the task's rows, B_k and B."""
        rows = batch["task"] == self.number
        own = self.term.counts({name: value[rows] for name, value in batch.items()})
        return torch.cat([own, torch.stack([rows.sum(), torch.ones_like(rows).sum()])])

    def share(self, own: Tensor, mean: Tensor) -> Tensor:
        """Return the term's share, with B_k / B of the whole step in place of the batch's."""
        (rows, size), (mean_rows, mean_size) = own[-2:], mean[-2:]
        share: Tensor = mean_rows / rows.clamp(min=1) * size / mean_size
        return share * self.term.share(own[:-2], mean[:-2])

    def settings(self) -> dict[str, float]:
        """Return the term's."""
        self.term.progress = self.progress
        return self.term.settings()

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the term's mean over the task's rows, times their share of the batch."""
        return self.parts(student, teacher, batch).sum()

    def parts(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the term's parts for the task's rows, times their share of the batch; zero without rows."""
        rows = (batch["task"] == self.number).nonzero().squeeze(1)
        if not len(rows):
            return student.logits[rows].sum().view(1)
        own = {name: value[rows] for name, value in batch.items()}
        if not self.scores:
            own["labels"] = own["labels"].long()
        self.term.progress = self.progress
        try:
            parts = self.term.parts(self._of(student, rows), self._of(teacher, rows), own)
        except ValueError as error:
            raise ValueError(f"task {self.name}: {error}") from error
        return parts * (len(rows) / len(batch["task"]))

    def _of(self, output: ModelOutput, rows: Tensor | slice) -> ModelOutput:
        return ModelOutput(output.logits[rows][:, self.columns])
