"""What a split shows of a model beside scores: confusions, calibration, distance from its teacher.

Everything is accumulated batch by batch in sums and a few examples, however large the split is.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_lightning.types import Batch, is_labelled

EXAMPLES = 12
"""The examples that are kept, of those where student and teacher differ most."""
MOST_CLASSES = 20
"""Classes up to which it is counted which one is taken for which."""
LIKELIEST = 3
"""The classes that are kept of an example."""
BINS = 15
"""Of confidence, as for the calibration error."""


class Apart(NamedTuple):
    """An example on which a student and its teacher differ.

    Attributes:
        distance: By how much; infinity where either is NaN.
        number: Its `index`.
        label: The class or score; None where it has none.
        student: What the student predicts: probabilities `(C,)`, or a score `(1,)`.
        teacher: What the teacher predicts.
    """

    distance: float
    number: int
    label: float | None
    student: list[float]
    teacher: list[float]


class Details(ABC):
    """What a split shows of one model.

    Attributes:
        apart: The examples on which it differs most from its teacher, the farthest first.
    """

    def __init__(self) -> None:
        self.apart: list[Apart] = []

    @abstractmethod
    def update(self, logits: Tensor, expected: Tensor | None, rows: Batch) -> None:
        """Add a batch.

        Args:
            logits: The model's, `(B, C)`.
            expected: Its teacher's, `(B, C)`; None: it has none.
            rows: `labels` and `index`, `(B,)`.
        """

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """Return what was counted, as plain values."""

    def examples(self) -> list[dict[str, Any]]:
        """Return what is predicted for the examples in `apart`, as plain values."""
        return [
            {"index": one.number, "distance": one.distance, "label": one.label,
             "student": self._shown(one.student), "teacher": self._shown(one.teacher)}
            for one in self.apart
        ]  # fmt: skip

    @abstractmethod
    def _shown(self, predicted: list[float]) -> Any:
        """Return what is kept of a prediction."""

    def _keep(self, distance: Tensor, rows: Batch, student: Tensor, teacher: Tensor) -> None:
        """Keep the farthest of a batch, and of those before it; NaN is the farthest of all."""
        distance = torch.where(distance.isnan(), torch.inf, distance)
        places = distance.sort(descending=True, stable=True).indices[:EXAMPLES].tolist()
        labels, known = rows["labels"].tolist(), is_labelled(rows["labels"]).tolist()
        added = [
            Apart(
                float(distance[i]), int(rows["index"][i]), labels[i] if known[i] else None, student[i].tolist(),
                teacher[i].tolist(),
            )
            for i in places if distance[i] > 0
        ]  # fmt: skip
        self.apart = heapq.nlargest(EXAMPLES, [*self.apart, *added], key=lambda one: (one.distance, -one.number))


class ClassDetails(Details):
    r"""Of classes: what is taken for what, how often confidence is right, and where the teacher differs.

    Two predictions differ by $ \frac{1}{2} \sum_c |p^s_c - p^t_c| $, the total variation distance, in [0, 1].

    Args:
        classes: C.

    >>> details = ClassDetails(2)
    >>> logits = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    >>> details.update(logits, logits.flip(1), {"labels": torch.tensor([1, 1]), "index": torch.tensor([5, 6])})
    >>> details.compute()["confusion"]
    [[0, 0], [1, 1]]
    >>> [(one.number, round(one.distance, 3)) for one in details.apart]
    [(6, 0.905), (5, 0.762)]
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.counts = torch.zeros(3, classes, dtype=torch.int64)  # labels, predictions, both
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64) if classes <= MOST_CLASSES else None
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # examples, their confidence, how many are right

    def update(self, logits: Tensor, expected: Tensor | None, rows: Batch) -> None:
        """Add a batch; rows without a label are not counted, and what is NaN predicts no class."""
        chances = logits.float().softmax(-1).cpu()
        labels = rows["labels"].cpu()
        labelled, counted = is_labelled(labels), ~chances.isnan().any(-1)
        of_all, counted = labels[labelled].long(), labelled & counted
        confidence, predicted = chances[counted].max(-1)
        known = labels[counted].long()
        right = known == predicted
        self.counts += torch.stack([one.bincount(minlength=self.classes) for one in (of_all, predicted, known[right])])
        if self.confusion is not None:
            pairs = (known * self.classes + predicted).bincount(minlength=self.classes**2)
            self.confusion += pairs.view(self.classes, self.classes)
        places = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1)[1:-1])
        values = torch.stack([torch.ones_like(confidence), confidence, right.float()]).double()
        self.bins.index_add_(1, places, values)
        if expected is not None:
            teacher = expected.float().softmax(-1).cpu()
            self._keep((chances - teacher).abs().sum(-1) / 2, rows, chances, teacher)

    def compute(self) -> dict[str, Any]:
        """Return labels, predictions and right ones by class, the confusion (label, prediction) and bins.

        `unpredicted` is the number of labels for which the model predicts nothing, since a logit is NaN: they are among
        the labels, and in neither confusion nor bins.
        """
        labels, predicted, right = self.counts.tolist()
        return {
            "labels": labels, "predicted": predicted, "right": right, "unpredicted": sum(labels) - sum(predicted),
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "bins": [
                {"examples": int(count), "confidence": summed / count, "accuracy": hits / count}
                for count, summed, hits in self.bins.T.tolist() if count
            ],
        }  # fmt: skip

    def _shown(self, predicted: list[float]) -> list[list[float]]:
        """Return the likeliest classes with their probabilities; none where they are NaN."""
        if any(map(math.isnan, predicted)):
            return []
        order = sorted(range(len(predicted)), key=lambda number: -predicted[number])[:LIKELIEST]
        return [[number, predicted[number]] for number in order]


class TokenDetails(ClassDetails):
    """Of tags: the same for the first token of each word; single words are not kept as examples."""

    def update(self, logits: Tensor, expected: Tensor | None, rows: Batch) -> None:
        """Add a batch: logits `(B, L, C)`, labels `(B, L)`."""
        words = rows.get("begins", rows["keep"])
        super().update(logits[words], None, {"labels": rows["labels"][words]})


class ScoreDetails(Details):
    """Of scores: where the teacher's differ most."""

    def update(self, logits: Tensor, expected: Tensor | None, rows: Batch) -> None:
        """Add a batch."""
        if expected is not None:
            own, teacher = logits.reshape(-1, 1).float().cpu(), expected.reshape(-1, 1).float().cpu()
            self._keep((own - teacher).abs()[:, 0], rows, own, teacher)

    def compute(self) -> dict[str, Any]:
        """Return nothing: the scores of a regression tell the rest."""
        return {}

    def _shown(self, predicted: list[float]) -> float:
        """Return the score."""
        return predicted[0]


class PartDetails(Details):
    """What a split shows of one of several tasks.

    Args:
        inner: Of the task alone.
        number: Its own, as the batches' `task` has it.
        columns: Its logits.
        whole: Whether labels are whole numbers, which batches of several tasks hold as floats.
    """

    def __init__(self, inner: Details, number: int, columns: range, whole: bool) -> None:
        super().__init__()
        self.inner, self.number, self.whole = inner, number, whole
        self.columns = slice(columns.start, columns.stop)

    def update(self, logits: Tensor, expected: Tensor | None, rows: Batch) -> None:
        """Add the examples of its task."""
        chosen = rows["task"] == self.number
        own = {name: rows[name][chosen] for name in ("labels", "index")}
        if self.whole:
            own["labels"] = own["labels"].long()
        teacher = None if expected is None else expected[chosen][:, self.columns]
        self.inner.update(logits[chosen][:, self.columns], teacher, own)
        self.apart = self.inner.apart

    def compute(self) -> dict[str, Any]:
        """Return what the task's own counted."""
        return self.inner.compute()

    def _shown(self, predicted: list[float]) -> Any:
        return self.inner._shown(predicted)
