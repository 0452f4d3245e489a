"""Learning where known spans start and end."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.span_soft_target import log_positions
from kd_lightning.losses.term import Reduction, Term, check_mask, in_float32, reduce
from kd_lightning.types import END, IGNORE, START, Batch, ModelOutput


@in_float32
def span_labels(logits: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Cross-entropy of a span's start and of its end, each over positions; half their sum, in nats.

    .. math:: -\tfrac{1}{2} (\log \mathrm{softmax}_l(z_{l1})_{start} + \log \mathrm{softmax}_l(z_{l2})_{end})

    over the positions l that the mask keeps (Devlin et al. 2019, arXiv 1810.04805, section 4.2), averaged over the
    windows that have a start and an end among these. A batch without any gives 0 with a graph.

    Args:
        logits: Of starts and ends, `(B, L, 2)`.
        labels: `(B, L)` int64: 1 where the span starts, 2 where it ends, 3 where it does both; 0 or -100 elsewhere.
        mask: `(B, L)` bool, True = a span may start or end there; None: anywhere.
        reduction: `mean` over the windows, `sum`, or `none` for one value a window, `(B,)`.

    Raises:
        ValueError: Labels that are not one for each position.

    Example:
        >>> span_labels(torch.zeros(1, 4, 2), torch.tensor([[0, 1, 2, 0]])).item()  # log 4
        1.3862943649291992
    """
    if labels.shape != logits.shape[:-1] or logits.shape[-1] != 2:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected (B, L, 2), of starts and ends, "
            "and (B, L)"
        )
    check_mask(mask, labels.shape)
    places = span_places(labels, mask)
    known = places.any(1).all(1)
    position = places.to(torch.uint8).argmax(1)
    read = known.unsqueeze(1) if mask is None else mask & known.unsqueeze(1)  # other windows reach no gradient
    values = -log_positions(logits, read.expand(labels.shape)).gather(1, position.unsqueeze(1)).squeeze(1).mean(1)
    return reduce(values, known, reduction)


def span_places(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return where a span starts and where it ends, `(B, L, 2)` bool."""
    counts = labels != IGNORE
    counts = counts if mask is None else counts & mask
    return torch.stack([(labels & bit).bool() & counts for bit in (START, END)], 2)


class SpanLabelsLoss(Term):
    """Learning from known spans; see `span_labels` for the formula."""

    uses_teacher = False

    def counts(self, batch: Batch) -> Tensor:
        """Return how many windows have a known span, `(1,)`."""
        places = span_places(batch["labels"], batch.get("keep"))
        return places.any(1).all(1).sum(dtype=torch.float32).view(1)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the batch's windows with a known span."""
        return span_labels(student.logits, batch["labels"], batch.get("keep"))
