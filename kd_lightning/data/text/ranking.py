"""Queries with documents as a `LightningDataModule`: pairs in batches of whole queries."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.config.budget import worth
from kd_lightning.data.datamodule import Role
from kd_lightning.data.options import check_least
from kd_lightning.data.text import tokens
from kd_lightning.data.text.corpus import Sentence
from kd_lightning.data.text.grouped import GroupData
from kd_lightning.data.text.lists import ListCorpus, RankedList, check_ranked
from kd_lightning.data.text.negatives import Encoder, with_negatives
from kd_lightning.tasks import Ranking
from kd_lightning.types import Batch

VERSION = 1
"""Raised when the same queries become other batches."""


class GradeColumns:
    """What a batch has of each query and document beside their tokens, by its `index`.

    Args:
        lists: All queries, in the order of their rows.

    Attributes:
        group: Number of its query, `(N,)`.
        place: Its document's place in the query's list, `(N,)`.
        grade: How relevant the document is, `(N,)`.
    """

    def __init__(self, lists: Sequence[RankedList]) -> None:
        sizes = np.array([len(one.documents) for one in lists], np.int64)
        self.group = np.repeat(np.arange(len(lists)), sizes)
        self.place = np.arange(len(self.group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self.grade = np.array([grade for one in lists for grade in one.grades], np.float32)

    def at(self, index: NDArray[np.int64]) -> Batch:
        """Return the entries of some rows, `(B,)`."""
        return {"group": torch.from_numpy(self.group[index]), "labels": torch.from_numpy(self.grade[index])}


class RankingData(GroupData):
    """Queries with documents, which a network ranks by a score for each.

    A row is a query and one of its documents, with a stable `index`, for which the teacher's score is stored. Batches
    have whole queries, `batch_size` in training and `eval_batch_size` in evaluations, with their documents in the order
    of their file: nothing is compared across batches, and nothing reordered. A pair of more than `max_length` tokens is
    cut where it is longer.

    Args:
        hard_negatives: Give each training query so many documents of others besides its own, those that a sentence
            encoder finds for it; and those of validation and test that have nothing but relevant ones, from their own
            split. They come last and have grade 0; the teacher scores them as all others.
        negatives_by: The sentence encoder, as `negatives.Encoder` takes it: such as an exported bi-encoder's folder.
        options: Those of `GroupData`; `train_examples` are queries.

    Raises:
        ConfigError: An option out of its range.
    """

    parts = ("train", "validation", "test")
    texts, evaluates_groups = 2, True

    def __init__(self, hard_negatives: int = 0, negatives_by: str = "minilm", **options: Any) -> None:
        super().__init__(**options)
        check_least(0, hard_negatives=hard_negatives)
        self.hard_negatives, self.negatives_by = hard_negatives, negatives_by

    @abstractmethod
    def read(self) -> ListCorpus:
        """Return the queries of each split."""

    def prepare(self) -> None:
        """Read, split and encode everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self.read()
        drawn = {"train": self._drawn(corpus.train)[0], "validation": corpus.validation, "test": corpus.test}
        of_parts = self._searched(drawn)
        lists = [one for part in of_parts.values() for one in part]
        rows: list[Sentence] = [(one.query, document) for one in lists for document in one.documents]
        self._groups, self.class_names = len(of_parts["train"]), ["score"]
        trained = rows[: sum(len(one.documents) for one in of_parts["train"])]
        size = fmean(len(text.encode()) for row in trained for text in row) * 2
        self.worth = worth(size, self.max_length) * math.sqrt(len(trained) / self._groups)
        self._load_tokenizers([text for row in trained for text in row])
        self._lay_out([sum(len(one.documents) for one in part) for part in of_parts.values()])
        self._columns = GradeColumns(lists)
        kept = {name: [[one.query, one.documents, one.grades] for one in part] for name, part in of_parts.items()}
        self._encode(rows, kept, [VERSION, tokens.VERSION, self.max_length])

    def _searched(self, of_parts: dict[str, list[RankedList]]) -> dict[str, list[RankedList]]:
        """Return the queries of each split with their hard negatives.

        Raises:
            DataError: A validation or test split in which there is nothing to rank.
        """
        found = dict(of_parts)
        if self.hard_negatives:
            encoder = Encoder(self.negatives_by, self.max_length)
            for name, part in of_parts.items():
                if name != "train" and all(one.judged for one in part):
                    continue
                more = with_negatives(part, self.hard_negatives, encoder)
                found[name] = [
                    old if old.judged and name != "train" else new for old, new in zip(part, more, strict=True)
                ]
        for name in ("validation", "test"):
            remedy = "give documents of grade 0 (data.negative_column), or set data.hard_negatives"
            check_ranked(found[name], f"the {name} split", remedy)
        return found

    @property
    def task(self) -> Ranking:
        """A score for each query and document."""
        return Ranking()

    @property
    def title(self) -> str:
        """What is predicted."""
        return "ranking of a query's documents"

    def encode(self, pairs: Sequence[tuple[str, str]], role: Role = "student") -> Batch:
        """Return new queries and documents as one batch, `(B, L)`."""
        return self._encoded(pairs, role)
