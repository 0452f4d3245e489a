"""How probably the teacher ranks one document of a query above another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.lists import ListTerm, check_lists
from kd_lightning.losses.term import Scheduled, check_positive, in_float32, only_counted, reduce


@in_float32
def ranknet(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""KL divergence over the order of each two documents of a query, in nats times T².

    .. math:: \frac{T^2}{Q} \sum_q \frac{1}{|D_q|} \sum_{i < j} \mathrm{KL}\left(
              \sigma\left(\tfrac{t_i - t_j}{T}\right) \,\middle\|\, \sigma\left(\tfrac{s_i - s_j}{T}\right) \right)

    over the pairs :math:`D_q` of a query's documents. RankNet (Burges et al. 2005, "Learning to Rank using Gradient
    Descent") has the cross-entropy with a known probability, which differs by the target's entropy; here the teacher's
    scores give it. Queries of one document count nowhere.

    Args:
        student: Scores `(Q, M)`.
        teacher: The same shape; gets no gradient.
        temperature: T, of both sides.
        mask: Which places have a document, `(Q, M)` bool; None: all.

    Raises:
        ValueError: Shapes that differ, or a temperature that is not positive.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.0, 1.0]])
        >>> ranknet(scores, scores + 3).item()
        0.0
    """
    check_positive("temperature", temperature)
    mask = check_lists(student, teacher, mask)
    own, expected = (
        _above(only_counted(scores, mask) / temperature) for scores in (student, teacher.detach())
    )  # fmt: skip
    terms = torch.stack([
        (sign * expected).sigmoid() * (F.logsigmoid(sign * expected) - F.logsigmoid(sign * own)) for sign in (1, -1)
    ]).sum(0)  # fmt: skip
    pairs = (mask.unsqueeze(2) & mask.unsqueeze(1)).triu(1)
    mean = only_counted(terms, pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    return temperature**2 * reduce(mean, mask.sum(1) > 1, "mean")


def _above(scores: Tensor) -> Tensor:
    """Return how far each document is above each other, `(Q, M, M)`."""
    return scores.unsqueeze(2) - scores.unsqueeze(1)


class RankNetLoss(ListTerm):
    """The order of each two documents of a query; see `ranknet` for the formula.

    Args:
        temperature: T, or a schedule over training progress.
    """

    def __init__(self, temperature: Scheduled = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor, grades: Tensor) -> Tensor:
        """Return the divergence, averaged over queries."""
        return ranknet(student, teacher, self.now(self.temperature), mask)
