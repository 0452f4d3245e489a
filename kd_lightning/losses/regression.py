"""Regression: the student predicts the teacher's scores."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.term import (
    Reduction,
    Term,
    check_mask,
    check_positive,
    check_same_shape,
    in_float32,
    kept_rows,
    only_counted,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput, is_labelled

Kind = Literal["mse", "smooth_l1"]


@in_float32
def regression(
    scores: Tensor,
    targets: Tensor,
    kind: Kind = "mse",
    threshold: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared or smoothed absolute difference of scores, in their unit squared.

    .. math:: \text{mse: } d^2 \qquad
              \text{smooth\_l1: } \begin{cases} d^2 / 2\delta & |d| < \delta \\ |d| - \delta / 2 & \text{else}
              \end{cases}, \quad d = s - t

    averaged over an example's scores where it has several. Regressing the teacher's output is due to Ba & Caruana 2014
    (arXiv 1312.6184); the smoothed form, in the scores' unit, is Girshick 2015 (arXiv 1504.08083) and lets a few wild
    scores of the teacher weigh less.

    Args:
        scores: The student's, `(B,)`, or `(B, K)` for K of each example.
        targets: The same shape: the teacher's scores, or labels. Gets no gradient.
        kind: `mse` or `smooth_l1`.
        threshold: delta > 0, below which `smooth_l1` is quadratic.
        mask: `(B,)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value an example.

    Raises:
        ValueError: Shapes that differ, an unknown kind, or a threshold that is not positive and finite.

    Example:
        >>> import torch
        >>> scores, targets = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0])
        >>> regression(scores, targets).item(), regression(scores, targets, "smooth_l1").item()
        (5.0, 1.5)
    """
    check_same_shape(scores, targets, "scores")
    check_mask(mask, scores.shape[:1])
    check_positive("threshold", threshold)
    scores, targets = only_counted(scores, mask), only_counted(targets.detach(), mask)
    if kind == "mse":
        values = F.mse_loss(scores, targets, reduction="none")
    elif kind == "smooth_l1":
        values = F.smooth_l1_loss(scores, targets, reduction="none", beta=threshold)
    else:
        raise ValueError(f"kind must be mse or smooth_l1, got {kind!r}")
    return reduce(values.flatten(1).mean(1) if values.ndim > 1 else values, mask, reduction)


class RegressionLoss(Term):
    """Learning scores from the teacher or from labels; see `regression` for the formula.

    Scores are the logits, `(B,)` or `(B, K)`, or of tokens `(B, L, K)` where the batch keeps them; `(B, 1)` and `(B,)`
    are the same. As labels, NaN and -100 mean none; a
    batch without `labels` gives 0.

    Args:
        kind: `mse` or `smooth_l1`.
        threshold: Below this difference `smooth_l1` is quadratic; in the scores' unit.
        target: Whom to learn from: `teacher`, which needs no labels, or `labels`.

    Raises:
        ValueError: An unknown target; at the first batch, what `regression` refuses.
    """

    def __init__(
        self, kind: Kind = "mse", threshold: float = 1.0, target: Literal["teacher", "labels"] = "teacher"
    ) -> None:
        super().__init__()
        if target not in ("teacher", "labels"):
            raise ValueError(f"target must be teacher or labels, got {target!r}")
        self.kind: Kind = kind
        self.threshold = threshold
        self.uses_teacher = target == "teacher"
        self.averages = "logits" if self.uses_teacher else "labels"

    def counts(self, batch: Batch) -> Tensor:
        """Return how many examples have a target."""
        if self.uses_teacher or "labels" not in batch:
            return super().counts(batch)
        return _known(_scores(batch["labels"])).sum(dtype=torch.float32).view(1)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the examples that have a target."""
        mask = kept_rows(student.logits, batch) if student.logits.ndim > 2 else None
        scores = _scores(student.logits)
        if self.uses_teacher and mask is not None:
            check_same_shape(student.logits, teacher.logits)
            rows, expected = (output.logits.flatten(0, -2) for output in (student, teacher))
            return regression(rows, expected, self.kind, self.threshold, mask.flatten())
        if self.uses_teacher:
            return regression(scores, _scores(teacher.logits), self.kind, self.threshold)
        if "labels" not in batch:
            return scores[:0].sum()
        labels = _scores(batch["labels"]).to(scores.dtype)
        return regression(scores, labels, self.kind, self.threshold, _known(labels))


def _known(labels: Tensor) -> Tensor:
    """Return which examples have all their scores, `(B,)`."""
    known = is_labelled(labels)
    return known if labels.ndim == 1 else known.all(-1)


def _scores(values: Tensor) -> Tensor:
    return values.squeeze(1) if values.ndim == 2 and values.shape[1] == 1 else values
