"""Scores of rankings: of each query's documents by grade, and how near a ranking is to a teacher's.

A query's documents come in several batches, so the scores of a split are kept until it is scored: some numbers a
document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.tasks.retrieval import K, Kept
from kd_lightning.tasks.scores import Scores, Values
from kd_lightning.types import Batch


class Ranked:
    """Queries with their documents, as flat rows sorted by query.

    Args:
        group: The query of each document, `(N,)`.
    """

    def __init__(self, group: Tensor) -> None:
        self.groups, self.query, self.sizes = torch.unique(group, return_inverse=True, return_counts=True)
        self.first = self.sizes.cumsum(0) - self.sizes

    def ranks(self, *keys: Tensor) -> Tensor:
        """Return each document's rank in its query, from 0, by keys of which the first weighs most, `(N,)`.

        >>> Ranked(torch.tensor([5, 5, 7])).ranks(torch.tensor([2.0, 1.0, 0.0])).tolist()
        [1, 0, 0]
        """
        order = torch.arange(len(self.query), device=self.query.device)
        for key in (*reversed(keys), self.query):
            order = order[key[order].argsort(stable=True)]
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device=order.device) - self.first[self.query[order]]
        return ranks

    def middle_ranks(self, values: Tensor) -> Tensor:
        """Return each document's rank in its query; equal values share the mean of theirs, `(N,)` float64."""
        lowest, highest = self.ranks(values), self.ranks(values, -self.ranks(values))
        return (lowest + highest).double() / 2

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each query's documents, `(Q,)`."""
        return values.new_zeros(len(self.sizes)).index_add(0, self.query, values)


def list_scores(ranked: Ranked, scores: Tensor, grades: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Return queries' scores and weights, `(Q,)` both, from scores and grades of documents, `(N,)`.

    With the grade :math:`g_i` of the document at rank i, and :math:`g^*_i` of the best order's:

    .. math:: \mathrm{nDCG@10} = \frac{\sum_{i \le 10} g_i / \log_2(i + 1)}{\sum_{i \le 10} g^*_i / \log_2(i + 1)},
              \quad \mathrm{MRR@10} = \max_{i \le 10,\, g_i > 0} \frac{1}{i}

    (Järvelin & Kekäläinen 2002). The gain is the grade itself, as in trec_eval's `ndcg_cut`, not 2 to its power. Of
    documents with equal scores the less relevant one comes first, so that a network which scores all alike gains
    nothing from the order in a file. A query weighs 1 where a document is relevant and another one is not; otherwise
    there is nothing to rank, any order scores the same, and it weighs 0.

    >>> ranked, scores = Ranked(torch.tensor([0, 0, 0])), torch.tensor([3.0, 2.0, 2.0])
    >>> found = list_scores(ranked, scores, torch.tensor([0.0, 1.0, 0.0]))
    >>> {name: float(value) for name, (value, _) in found.items()}
    {'mrr@10': 0.3333333333333333, 'ndcg@10': 0.5, 'success@1': 0.0}
    """
    grades = grades.double()
    rank, best = ranked.ranks(-scores, grades), ranked.ranks(-grades)
    gains, ideal = (
        ranked.sums(torch.where(place < K, grades / (place + 2).double().log2(), 0.0)) for place in (rank, best)
    )
    reciprocal = torch.where((grades > 0) & (rank < K), 1 / (rank + 1).double(), 0.0)
    first = reciprocal.new_zeros(len(ranked.sizes)).scatter_reduce(0, ranked.query, reciprocal, "amax")
    relevant = ranked.sums((grades > 0).double())
    judged = ((relevant > 0) & (relevant < ranked.sizes)).double()
    found = {f"mrr@{K}": first, f"ndcg@{K}": gains / ideal.masked_fill(ideal == 0, 1.0)}
    return {name: (value, judged) for name, value in (found | {"success@1": (first == 1).double()}).items()}


def nearness(ranked: Ranked, scores: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how near two rankings are: each query's values and weights, `(Q,)` both.

    Args:
        ranked: The queries of the documents.
        scores: Those of the documents, `(N,)`.
        teacher: The teacher's.

    Returns:
        `spearman_to_teacher`, Spearman's rank correlation; a query whose documents one side scores all alike has none
        and weighs 0. `top_to_teacher`, whether both have the same document on top; equal scores share the place, and
        a query of one document weighs 0.
    """
    own, theirs = (ranked.middle_ranks(values) for values in (scores, teacher))
    centre = (ranked.sizes[ranked.query] - 1).double() / 2
    own, theirs = own - centre, theirs - centre
    spread = (ranked.sums(own.square()) * ranked.sums(theirs.square())).sqrt()
    defined = (spread > 0).double()
    correlation = ranked.sums(own * theirs) / spread.masked_fill(spread == 0, 1.0)
    tops = [_on_top(ranked, values) for values in (scores, teacher)]
    same = ranked.sums((tops[0] & tops[1]).double()).clamp(max=1.0)
    return {"spearman_to_teacher": (correlation, defined), "top_to_teacher": (same, (ranked.sizes > 1).double())}


def _on_top(ranked: Ranked, values: Tensor) -> Tensor:
    most = values.new_full((len(ranked.sizes),), -torch.inf).scatter_reduce(0, ranked.query, values, "amax")
    return values == most[ranked.query]


class RankingScores(Scores):
    """Scores that are means over a split's queries, against grades or against a teacher's scores.

    Args:
        names: Which.
        graded: They are against grades.
    """

    divides = False

    def __init__(self, names: list[str], graded: bool) -> None:
        super().__init__({"kept": Kept()})
        self._names, self.graded = names, graded
        self._values: Values | None = None

    @property
    def names(self) -> list[str]:
        """Of the scores."""
        return self._names

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch: scores `(B, 1)`, and grades `(B,)` or a teacher's scores `(B, 1)`."""
        columns = torch.stack([rows["index"], rows["group"]], 1)
        self.metrics["kept"].update(logits.view(-1, 1), against.view(-1, 1), columns)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes; NaN where a score is NaN."""
        scores, others, columns = self.metrics["kept"].compute()  # type: ignore[operator]
        self._values = None
        if not len(scores) or scores.isnan().any() or others.isnan().any():
            return {name: scores.new_tensor(torch.nan) for name in self.names}
        ranked = Ranked(columns[:, 1].long())
        if self.graded:
            found = list_scores(ranked, scores[:, 0], others[:, 0])
        else:
            found = nearness(ranked, scores[:, 0], others[:, 0])
        counts = torch.stack([weight for _, weight in found.values()]).any(0)
        of = {name: (value[counts], weight[counts]) for name, (value, weight) in found.items()}
        self._values = Values(ranked.groups[counts], of)
        return {name: (value * weight).sum().div(weight.sum()).float() for name, (value, weight) in found.items()}

    def values(self) -> Values | None:
        """Return the scores of each query that counts, as of the last `compute`."""
        return self._values

    def states(self) -> Tensor:
        """Refuse: a query's documents are ranked among each other.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a query's documents are ranked among each other: scores of parts of a split do not add up")
