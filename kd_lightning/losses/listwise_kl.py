"""The teacher's distribution over a query's documents."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.lists import ListTerm, check_lists, log_softmax_within
from kd_lightning.losses.term import Scheduled, check_positive, in_float32, reduce


@in_float32
def listwise_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""KL divergence over a query's documents, in nats times T².

    .. math:: \frac{T^2}{Q} \sum_q \sum_d p^t_{qd} \log \frac{p^t_{qd}}{p^s_{qd}}, \quad
              p_{qd} = \frac{e^{s_{qd} / T}}{\sum_k e^{s_{qk} / T}}

    The top-one probabilities of ListNet (Cao et al. 2007) with the teacher's scores as the target, as RocketQAv2 has it
    (Ren et al. 2021, arXiv 2110.07367). Scores may differ by a number for each query. Queries of one document count
    nowhere.

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
        >>> listwise_kl(scores, scores + 3).item()
        0.0
    """
    check_positive("temperature", temperature)
    mask = check_lists(student, teacher, mask)
    own, expected = (log_softmax_within(scores / temperature, mask) for scores in (student, teacher.detach()))
    divergence = (expected.exp() * (expected - own)).sum(1)
    return temperature**2 * reduce(divergence, mask.sum(1) > 1, "mean")


class ListwiseKLLoss(ListTerm):
    """Distributions over each query's documents; see `listwise_kl` for the formula.

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
        return listwise_kl(student, teacher, self.now(self.temperature), mask)
