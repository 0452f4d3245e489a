"""Base class of terms on pairs and triplets of texts, and what of a batch they compare."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.losses.relations import unit
from kd_lightning.losses.term import Term
from kd_lightning.types import Batch, ModelOutput


class Pairs(NamedTuple):
    """Pairs of a batch, and all texts that may be found for their queries.

    Attributes:
        queries: Rows of the queries, `(P,)`.
        documents: Rows of all texts that are no queries, `(M,)`: positives and the negatives of triplets.
        positive: Each query's positive, its place among the documents, `(P,)`.
        others: Which documents are negatives of which query, `(P, M)` bool: not its own positive, nor another of a
            query with the same text, nor a text equal to any of these or to the query itself.
    """

    queries: Tensor
    documents: Tensor
    positive: Tensor
    others: Tensor

    @classmethod
    def of(cls, batch: Batch, scored: bool = False) -> Pairs:
        """Return the pairs of a batch, without scores or with them.

        Raises:
            ValueError: It is a batch of other data.
        """
        if lacking := [name for name in ("group", "place", "text", "score") if name not in batch]:
            raise ValueError(
                f"the batch has no {', '.join(lacking)}: this loss is for pairs of texts (data=embedding_files, "
                "debian_pairs)"
            )
        group, place, text = batch["group"], batch["place"], batch["text"]
        wanted = batch["score"].isnan() != scored
        documents = ((place > 0) & wanted).nonzero()[:, 0]
        same_group = (group[:, None] == group[documents]) & ((place == 0) & wanted)[:, None] & (place[documents] == 1)
        queries, positive = same_group.nonzero().unbind(1)
        of_query = text[queries][:, None] == text[queries]  # queries of one text share their positives
        equal = text[documents][positive][:, None] == text[documents]
        found = (of_query.float() @ equal.float()) > 0
        return cls(queries, documents, positive, ~found & (text[queries][:, None] != text[documents]))


class PairTerm(Term):
    """A term on the cosines of a batch's queries and documents, a mean over its pairs; zero without any.

    Args:
        widths: Widths at which the first entries of an embedding are compared as well; the value is the mean over
            these and the whole.

    Raises:
        ValueError: When compared, embeddings that are no wider than one of `widths`.
    """

    scored: bool = False

    def __init__(self, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.widths = list(widths)

    def counts(self, batch: Batch) -> Tensor:
        """Return how many pairs the batch has."""
        return torch.full((1,), float(len(Pairs.of(batch, self.scored).queries)), device=batch["group"].device)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the mean over the pairs, from the cosines `(P, M)` of queries with documents on either side."""

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the batch's pairs, and over the widths."""
        pairs = Pairs.of(batch, self.scored)
        if not len(pairs.queries):
            return student.logits[:0].sum()
        expected = cosines(teacher.logits.detach(), pairs) if self.uses_teacher else student.logits.new_zeros(0)
        values = [
            self.compare(cosines(part, pairs), expected, pairs, batch) for part in cut(student.logits, self.widths)
        ]
        return torch.stack(values).mean()


def cosines(embeddings: Tensor, pairs: Pairs) -> Tensor:
    """Return the cosines of queries with documents, `(P, M)`, in float32 or wider."""
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    with torch.autocast(wide.device.type, enabled=False):
        return unit(wide[pairs.queries]) @ unit(wide[pairs.documents]).T


def cut(embeddings: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return embeddings `(B, D)` whole, and their first entries at each width.

    Raises:
        ValueError: They are no wider than one of the widths.
    """
    if wrong := [width for width in widths if not 0 < width < embeddings.shape[1]]:
        raise ValueError(f"widths={list(widths)}: the embedding is {embeddings.shape[1]} wide, not above {wrong[0]}")
    return [embeddings, *(embeddings[:, :width] for width in widths)]
