"""Cross-entropy with the true labels, where there are any."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.chunked_linear import NoTeacher, chunked_sums
from kd_lightning.losses.logit_term import check_labels
from kd_lightning.losses.merged import merged
from kd_lightning.losses.term import Averages, Reduction, Term, check_mask, in_float32, kept_rows, only_counted, reduce
from kd_lightning.types import IGNORE, Batch, ModelOutput


@in_float32
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of labels under softmax(logits), in nats, over the examples that have a label.

    .. math:: -\sum_c q_c \log \mathrm{softmax}(z)_c, \quad q = (1 - \epsilon)\,\mathrm{onehot}(y) + \epsilon / C

    Unlike torch's mean, a batch without any label gives 0 with a graph, not NaN.

    Args:
        logits: `(B, C)` or `(B, L, V)`.
        labels: `(B,)` or `(B, L)` int64; -100 counts neither in the sum nor in the mean.
        label_smoothing: epsilon in [0, 1) (Szegedy et al. 2015, arXiv 1512.00567).
        mask: As the labels, bool, True = counts (if it has a label).
        reduction: `mean` over what counts, `sum`, or `none`.

    Raises:
        ValueError: Labels whose shape is not the logits' without the last axis, a mask whose shape is not the labels',
            or epsilon out of range.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100])).item()  # log 4
        1.3862943649291992
    """
    check_labels(labels, logits)
    check_mask(mask, labels.shape)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    counts = labels != IGNORE
    counts = counts if mask is None else counts & mask
    if logits.ndim == 3 and not label_smoothing:  # of tokens, where classes may be many: fewer passes over the logits
        right = merged(logits, labels.new_empty(*labels.shape, 0), labels, counts)[1]
        assert right is not None
        return reduce(-right, counts, reduction)
    values = F.cross_entropy(
        only_counted(logits, counts).flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(labels.shape)
    return reduce(values, counts, reduction)


class CrossEntropyLoss(Term):
    """Learning from labels; see `cross_entropy` for the formula.

    Of a student that leaves out its output layer (logits `(B, L, 0)`) it is computed chunk by chunk, from the features
    `last_hidden` and `head`.

    Args:
        label_smoothing: epsilon in [0, 1).
    """

    averages: Averages = "labels"
    uses_teacher = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over labelled examples or positions."""
        mask = kept_rows(student.logits, batch)
        if not student.logits.shape[-1] and "head" in student.features:
            layer = student.features["last_hidden"], student.features["head"], student.features.get("head_bias")
            loss: Tensor = chunked_sums(layer, NoTeacher(self.label_smoothing), batch["labels"], mask, None)[0]
            return loss
        return cross_entropy(student.logits, batch["labels"], self.label_smoothing, mask)
