"""Base class of terms on queries with their documents, and the matrix of scores that they compare."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.losses.term import Term, check_mask, check_same_shape, only_counted
from kd_lightning.types import Batch, ModelOutput


class Lists(NamedTuple):
    """The queries of a batch, each with a row of its documents in the batch's order.

    Attributes:
        query: The query of each row of the batch, from 0 to Q - 1, `(B,)`.
        place: Its document's place among the query's, `(B,)`.
        mask: Which places have a document, `(Q, M)` bool; M is the most that a query has.
    """

    query: Tensor
    place: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Lists:
        """Return the queries of a batch, by its `group`.

        Raises:
            ValueError: It is a batch of other data.
        """
        if "group" not in batch or batch["labels"].isnan().all():
            raise ValueError(
                "the batch has no grades of a query's documents: this loss is for ranking (data=ranking_files, "
                "debian_ranking)"
            )
        found, query, sizes = torch.unique(batch["group"], return_inverse=True, return_counts=True)
        order = query.argsort(stable=True)
        first = sizes.cumsum(0) - sizes
        place = torch.empty_like(query)
        place[order] = torch.arange(len(query), device=query.device) - first[query[order]]
        mask = torch.zeros(len(found), int(sizes.max()), dtype=torch.bool, device=query.device)
        mask[query, place] = True
        return cls(query, place, mask)

    def matrix(self, values: Tensor) -> Tensor:
        """Return a value of each document, `(B,)` or `(B, 1)`, as `(Q, M)`; 0 where there is none."""
        empty = values.new_zeros(self.mask.shape)
        return empty.index_put((self.query, self.place), values.reshape(-1))


class ListTerm(Term):
    """A term on the scores of each query's documents, a mean over queries; zero without any that counts."""

    def counted(self, mask: Tensor, grades: Tensor) -> Tensor:
        """Return what the mean is over, `(Q,)` bool: the queries of two documents or more.

        Args:
            mask: Which places have a document, `(Q, M)` bool.
            grades: How relevant it is, likewise.
        """
        return mask.sum(1) > 1

    def counts(self, batch: Batch) -> Tensor:
        """Return how many of them the batch has."""
        lists = Lists.of(batch)
        return self.counted(lists.mask, lists.matrix(batch["labels"])).sum(dtype=torch.float32).view(1)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor, grades: Tensor) -> Tensor:
        """Return the mean, from the scores `(Q, M)` of either side, of which those under `mask` count."""

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over the batch.

        Raises:
            ValueError: A network with more or fewer scores than one a document.
        """
        lists = Lists.of(batch)
        for output in (student, teacher):
            if output.logits.numel() != len(lists.query):
                raise ValueError(f"scores {tuple(output.logits.shape)}: expected one for each of {len(lists.query)}")
        grades = lists.matrix(batch["labels"])
        if not self.counted(lists.mask, grades).any():
            return student.logits[:0].sum()
        own, expected = (lists.matrix(output.logits) for output in (student, teacher))
        return self.compare(own, expected.detach(), lists.mask, grades)


def check_lists(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask of two matrices of scores `(Q, M)`, all True where none is given.

    Raises:
        ValueError: Shapes that differ.
    """
    check_same_shape(student, teacher, "scores")
    check_mask(mask, student.shape)
    return torch.ones_like(student, dtype=torch.bool) if mask is None else mask


def log_softmax_within(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the log softmax of each row `(Q, M)` over its places under `mask`, and 0 at the others.

    >>> log_softmax_within(torch.zeros(1, 3), torch.tensor([[True, True, False]])).exp()
    tensor([[0.5000, 0.5000, 1.0000]])
    """
    lowest = torch.finfo(scores.dtype).min  # -inf has no softmax where nothing counts
    logs = only_counted(scores, mask).masked_fill(~mask, lowest).log_softmax(1)
    return logs.masked_fill(~mask, 0.0)
