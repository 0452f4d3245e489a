"""Margins of scores: how far the teacher puts a query's relevant document above the others."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.lists import ListTerm
from kd_lightning.losses.margin_mse import margin_mse


class MarginMSEScoresLoss(ListTerm):
    r"""Margins of each relevant document to those of a lower grade, as the teacher scores them.

    .. math:: \frac{1}{R} \sum_q \sum_{d:\, g_{qd} > 0} \frac{1}{|L_{qd}|} \sum_{k \in L_{qd}}
              \left( (s_{qd} - s_{qk}) - (t_{qd} - t_{qk}) \right)^2, \quad L_{qd} = \{k : g_{qk} < g_{qd}\}

    It is the loss of the paper: a cross-encoder scores a query's relevant document and its negatives. R counts the
    relevant documents that have any, so a query with several of them weighs several times.
    """

    def counted(self, mask: Tensor, grades: Tensor) -> Tensor:
        """Return the relevant documents above another one, `(Q, M)` bool."""
        return mask & (grades > 0) & _lower(mask, grades).any(2)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor, grades: Tensor) -> Tensor:
        """Return the squared difference of margins, averaged over relevant documents."""
        query, positive = self.counted(mask, grades).nonzero().unbind(1)
        return margin_mse(student[query], teacher[query], positive, _lower(mask, grades)[query, positive])


def _lower(mask: Tensor, grades: Tensor) -> Tensor:
    """Return which documents have a lower grade than each one, `(Q, M, M)` bool."""
    return (grades.unsqueeze(1) < grades.unsqueeze(2)) & mask.unsqueeze(1)
