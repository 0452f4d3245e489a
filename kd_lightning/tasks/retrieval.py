"""Scores of embeddings: retrieval, rank correlation with scored pairs, and nearness to a teacher's.

Ranks depend on all documents of a split, so the embeddings of the split are kept until it is scored; products with the
corpus are taken a part of the queries at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef

from kd_lightning.tasks.scores import Scores, Values
from kd_lightning.types import Batch

K = 10
"""Documents of a query's ranking that count."""
AT_ONCE = 2**24
"""Similarities that are computed together: 64 MB in float32, however large the corpus."""
MOST_TEXTS = 1000
"""Texts whose similarities to one another are compared with the teacher's."""

ANCHOR, POSITIVE = 0, 1
"""Places in a pair or triplet: the query, and the text that belongs to it; later ones do not."""


class Judged(NamedTuple):
    """Which documents are relevant for which queries.

    Attributes:
        queries: Rows of the queries, one for each different text, `(Q,)`.
        documents: Rows of the documents, likewise, `(D,)`.
        relevant: Pairs `(R, 2)` of a query's and a document's number, each once.
        same: Each query's number among the documents, -1 where its text is none, `(Q,)`.
    """

    queries: Tensor
    documents: Tensor
    relevant: Tensor
    same: Tensor


def judged(group: Tensor, place: Tensor, text: Tensor) -> Judged:
    """Return the retrieval task of a split of pairs or triplets.

    Queries are the different anchors that have a positive; the corpus is all positives and negatives, each text once.
    What is relevant for a query are the positives of all groups whose anchor has its text.

    Args:
        group: Number of each row's pair or triplet, `(N,)`.
        place: Its place there, `(N,)`.
        text: A number of its text: equal texts have equal numbers, `(N,)`.

    >>> judged(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.tensor([5, 6, 5, 7])).relevant
    tensor([[0, 0],
            [0, 1]])
    """
    anchors, positives = ((place == wanted).nonzero()[:, 0] for wanted in (ANCHOR, POSITIVE))
    by_group = torch.full((int(group.max()) + 1 if len(group) else 0,), -1, device=group.device)
    by_group[group[anchors]] = anchors
    positives = positives[by_group[group[positives]] >= 0]
    query_texts, query_of = torch.unique(text[by_group[group[positives]]], return_inverse=True)
    others = (place != ANCHOR).nonzero()[:, 0]
    document_texts = torch.unique(text[others])
    relevant = torch.stack([query_of, torch.searchsorted(document_texts, text[positives])], 1)
    relevant = torch.unique(relevant, dim=0)
    place_of = torch.searchsorted(document_texts, query_texts).clamp(max=max(len(document_texts) - 1, 0))
    same = torch.where(document_texts[place_of] == query_texts, place_of, -1)
    return Judged(_first(text, query_texts, anchors), _first(text, document_texts, others), relevant, same)


def _first(text: Tensor, wanted: Tensor, among: Tensor) -> Tensor:
    """Return a row for each of the wanted texts, the first of those that may be."""
    place = torch.searchsorted(wanted, text[among]).clamp(max=max(len(wanted) - 1, 0))
    found = wanted[place] == text[among] if len(wanted) else torch.zeros_like(among, dtype=torch.bool)
    rows = torch.full((len(wanted),), int(text.numel()), device=text.device)
    return rows.scatter_reduce(0, place[found], among[found], "amin")


def search(queries: Tensor, documents: Tensor, count: int, never: Tensor | None = None) -> Tensor:
    """Return the documents nearest to each query by their inner product, `(Q, count)`, the nearest first.

    Args:
        queries: `(Q, D)`.
        documents: `(N, D)`.
        count: How many; at most N.
        never: A document that each query does not find, such as itself, `(Q,)`; -1: it may find all.

    >>> search(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]), 2)
    tensor([[1, 2],
            [0, 2]])
    """
    rows = max(AT_ONCE // max(len(documents), 1), 1)
    found = []
    for start in range(0, len(queries), rows):
        near = queries[start : start + rows] @ documents.T
        if never is not None:
            own = never[start : start + rows]
            has = own >= 0
            near[has.nonzero()[:, 0], own[has]] = -torch.inf
        found.append(near.topk(count).indices)
    return torch.cat(found) if found else torch.zeros(0, count, dtype=torch.long, device=queries.device)


def ranking_scores(found: Tensor, relevant: Tensor, documents: int) -> dict[str, Tensor]:
    r"""Return each query's scores `(Q,)` from its K = 10 nearest documents.

    With :math:`r_i` 1 where the document at rank i is relevant, and R relevant documents:

    .. math:: \mathrm{nDCG@10} = \frac{\sum_{i \le 10} r_i / \log_2(i + 1)}{\sum_{i \le \min(R, 10)} 1 / \log_2(i + 1)},
              \quad \mathrm{MRR@10} = \max_{i \le 10} \frac{r_i}{i}, \quad
              \mathrm{recall@k} = \frac{1}{R} \sum_{i \le k} r_i

    (Järvelin & Kekäläinen 2002; binary relevance, as in BEIR, Thakur et al. 2021, arXiv 2104.08663.)

    Args:
        found: The documents by rank, `(Q, k)`, k at most 10.
        relevant: Pairs of a query's and a document's number, `(R, 2)`, at least one of each query.
        documents: How many there are.

    >>> found = torch.tensor([[3, 1, 0]])
    >>> {name: round(float(value), 3) for name, value in ranking_scores(found, torch.tensor([[0, 1]]), 4).items()}
    {'ndcg@10': 0.631, 'mrr@10': 0.5, 'recall@1': 0.0, 'recall@10': 1.0}
    """
    queries, ranks = len(found), torch.arange(1, K + 1, device=found.device)
    keys = relevant[:, 0] * documents + relevant[:, 1]
    right = torch.isin(torch.arange(queries, device=found.device)[:, None] * documents + found, keys).double()
    count = relevant[:, 0].bincount(minlength=queries)
    gains = 1 / (ranks + 1).double().log2()
    ideal = gains.cumsum(0)[count.clamp(max=K) - 1]
    return {
        f"ndcg@{K}": (right * gains[: found.shape[1]]).sum(1) / ideal,
        f"mrr@{K}": (right / ranks[: found.shape[1]]).amax(1),
        "recall@1": right[:, :1].sum(1) / count,
        f"recall@{K}": right.sum(1) / count,
    }


class Kept(Metric):
    """The rows of a split that are needed together; sorted by `index`, whatever the batches and processes."""

    full_state_update = False
    embeddings: list[Tensor]
    others: list[Tensor]
    columns: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("embeddings", "others", "columns"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, others: Tensor, columns: Tensor) -> None:
        """Add a batch: embeddings `(B, D)`, another model's `(B, D')`, numbers `(B, C)`, `index` first."""
        self.embeddings.append(embeddings.detach().float())
        self.others.append(others.detach().float())
        self.columns.append(columns.double())

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all rows that were added; `(0, 1)` each where none was."""
        parts = (self.embeddings, self.others, self.columns)
        embeddings, others, columns = (
            part if isinstance(part, Tensor) else torch.cat(part) if part else torch.zeros(0, 1, device=self.device)
            for part in parts
        )
        order = columns[:, 0].argsort(stable=True)
        return embeddings[order], others[order], columns[order]


class PairScores(Scores):
    """Scores of embeddings from the pairs of a split: of retrieval, or of how well they rank scored pairs.

    Args:
        scored: Pairs have scores: Spearman's correlation of these with the cosines.
        widths: Further widths, at which only the first entries of the embeddings count.
    """

    divides = False

    def __init__(self, scored: bool, widths: Sequence[int] = ()) -> None:
        super().__init__({"kept": Kept()})
        self.scored, self.widths = scored, list(widths)
        self._values: Values | None = None

    @property
    def names(self) -> list[str]:
        """Of the scores."""
        own = ["spearman"] if self.scored else [f"ndcg@{K}", f"mrr@{K}", "recall@1", f"recall@{K}"]
        return [*own, *(f"{own[0]}/{width}" for width in self.widths)]

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch: embeddings `(B, D)`."""
        columns = torch.stack([rows[name].double() for name in ("index", "group", "place", "text", "score")], 1)
        self.metrics["kept"].update(logits, logits[:, :0], columns)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes; NaN where an embedding has a NaN."""
        embeddings, _, columns = self.metrics["kept"].compute()  # type: ignore[operator]
        self._values = None
        if not len(embeddings) or embeddings.isnan().any():
            return {name: embeddings.new_tensor(torch.nan) for name in self.names}
        index, group, place, text = columns[:, :4].long().unbind(1)
        found: dict[str, Tensor] = {}
        for width in (None, *self.widths):
            vectors = F.normalize(embeddings[:, :width], dim=1)
            own = (
                {"spearman": _spearman_of_pairs(vectors, group, place, columns[:, 4])} if self.scored
                else self._retrieval(vectors, index, judged(group, place, text), width)
            )  # fmt: skip
            found |= own if width is None else {f"{(name := self.names[0])}/{width}": own[name]}
        return found

    def _retrieval(self, vectors: Tensor, index: Tensor, task: Judged, width: int | None) -> dict[str, Tensor]:
        documents = vectors[task.documents]
        found = search(vectors[task.queries], documents, min(K, len(documents)), task.same)
        scores = ranking_scores(found, task.relevant, len(documents))
        if width is None:
            weights = torch.ones(len(found), device=vectors.device)
            self._values = Values(index[task.queries], {name: (value, weights) for name, value in scores.items()})
        return {name: value.mean().float() for name, value in scores.items()}

    def values(self) -> Values | None:
        """Return each query's scores, as of the last `compute`; None of scored pairs."""
        return self._values

    def states(self) -> Tensor:
        """Refuse: ranks are among all documents of a split.

        Raises:
            TypeError: Always.
        """
        raise TypeError("ranks are among all documents of a split: scores of its parts do not add up")


def _spearman_of_pairs(vectors: Tensor, group: Tensor, place: Tensor, score: Tensor) -> Tensor:
    first, second = ((place == wanted).nonzero()[:, 0] for wanted in (ANCHOR, POSITIVE))
    by_group = torch.full((int(group.max()) + 1,), -1, device=group.device)
    by_group[group[first]] = first
    second = second[by_group[group[second]] >= 0]
    cosines = (vectors[by_group[group[second]]] * vectors[second]).sum(1)
    return spearman_corrcoef(cosines.double(), score[second]).float()


class TeacherScores(Scores):
    """How near embeddings are to a teacher's, of any width.

    `spearman_to_teacher` is Spearman's correlation of the cosines of all pairs of up to 1,000 texts, drawn at random
    and alike for each model; `cosine_to_teacher` the mean cosine of a text's two embeddings, where both have one width.
    """

    divides = False

    def __init__(self) -> None:
        super().__init__({"kept": Kept()})

    @property
    def names(self) -> list[str]:
        """Of the scores."""
        return ["cosine_to_teacher", "spearman_to_teacher"]

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch: embeddings `(B, D)` and the teacher's `(B, D')`."""
        self.metrics["kept"].update(logits, against, rows["index"].view(-1, 1).expand(-1, 2))  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes; NaN where an embedding has a NaN."""
        own, teacher, _ = self.metrics["kept"].compute()  # type: ignore[operator]
        own, teacher = F.normalize(own, dim=1), F.normalize(teacher, dim=1)
        found: dict[str, Tensor] = {}
        if own.shape == teacher.shape:
            found["cosine_to_teacher"] = (own * teacher).sum(1).mean()
        drawn = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:MOST_TEXTS].to(own.device)
        cosines = [_above_diagonal(vectors[drawn] @ vectors[drawn].T) for vectors in (own, teacher)]
        invalid = own.isnan().any() | teacher.isnan().any() | torch.tensor(len(cosines[0]) < 2, device=own.device)
        rank = torch.nan if invalid else spearman_corrcoef(*(each.double() for each in cosines)).float()
        return {**found, "spearman_to_teacher": own.new_tensor(float(rank))}


def _above_diagonal(x: Tensor) -> Tensor:
    return x[torch.triu(torch.ones_like(x, dtype=torch.bool), diagonal=1)]
