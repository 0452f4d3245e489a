"""What grades teach of a query's documents without a teacher: the relevant ones score highest."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.lists import ListTerm, check_lists, log_softmax_within
from kd_lightning.losses.term import in_float32, only_counted, reduce


@in_float32
def list_labels(scores: Tensor, grades: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Cross-entropy of a query's documents with their grades, in nats.

    .. math:: -\frac{1}{Q} \sum_q \sum_d \frac{g_{qd}}{\sum_k g_{qk}} \log \frac{e^{s_{qd}}}{\sum_k e^{s_{qk}}}

    The top-one probability of ListNet (Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise
    Approach") with the share of the grades as its target (Bruch et al. 2019, "An Analysis of the Softmax Cross Entropy
    Loss for Learning-to-Rank with Binary Relevance"). Queries of one document, and those without a grade above 0, count
    nowhere.

    Args:
        scores: The student's, `(Q, M)`.
        grades: How relevant each document is, 0 and more, likewise; gets no gradient.
        mask: Which places have a document, `(Q, M)` bool; None: all.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> import torch
        >>> list_labels(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).item()  # ln 2
        0.6931471824645996
    """
    mask = check_lists(scores, grades, mask)
    gains = only_counted(grades.detach().to(scores.dtype), mask)
    total = gains.sum(1, keepdim=True)
    shares = gains / total.masked_fill(total == 0, 1.0)
    return reduce(-(shares * log_softmax_within(scores, mask)).sum(1), _counted(mask, gains), "mean")


def _counted(mask: Tensor, grades: Tensor) -> Tensor:
    return (mask.sum(1) > 1) & (grades.sum(1) != 0)


class ListLabelsLoss(ListTerm):
    """Grades of each query's documents; see `list_labels` for the formula.

    It uses no teacher: what a student learns from grades alone.
    """

    uses_teacher = False

    def counted(self, mask: Tensor, grades: Tensor) -> Tensor:
        """Return the queries of two documents or more, of which one is relevant, `(Q,)` bool."""
        return _counted(mask, grades)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor, grades: Tensor) -> Tensor:
        """Return the cross-entropy, averaged over queries."""
        return list_labels(student, grades, mask)
