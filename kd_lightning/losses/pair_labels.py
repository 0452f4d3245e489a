"""What pairs teach without a teacher: that they belong together, or how similar people found them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.losses.contrastive import ContrastiveLoss
from kd_lightning.losses.cosine_scores import CosineScoreLoss
from kd_lightning.losses.term import Term
from kd_lightning.types import Batch, ModelOutput


class PairLabelsLoss(Term):
    r"""Contrast of unscored pairs, and squared error of the cosines of scored ones; each a mean of its own.

    .. math:: -\frac{1}{P} \sum_i \log \frac{e^{s_{i,p(i)} / T}}{e^{s_{i,p(i)} / T} + \sum_{j \in N_i} e^{s_{ij} / T}}
              \quad \text{or} \quad \frac{1}{P} \sum_i (s_i - y_i)^2

    with cosines s of queries and documents, the negatives N of a query, and scores y of 0 to 1; see `contrastive` and
    `cosine_scores`. Data have pairs of one kind, so one of the two is zero.

    Args:
        temperature: T of the contrast.
        widths: See `PairTerm`.

    Raises:
        ValueError: A temperature that is not positive.
    """

    uses_teacher = False

    def __init__(self, temperature: float = 0.05, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.contrast, self.regression = ContrastiveLoss(temperature, widths), CosineScoreLoss(widths)
        self.widths = list(widths)

    def counts(self, batch: Batch) -> Tensor:
        """Return how many pairs the batch has without a score, and with one."""
        return torch.cat([self.contrast.counts(batch), self.regression.counts(batch)])

    def parts(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return both means."""
        return torch.stack([term(student, teacher, batch) for term in (self.contrast, self.regression)])

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return their sum."""
        return self.parts(student, teacher, batch).sum()
