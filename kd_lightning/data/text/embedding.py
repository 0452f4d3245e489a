"""Texts, pairs and triplets as a `LightningDataModule`, tokenised once, in batches of like length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.datamodule import Role
from kd_lightning.data.options import check_least
from kd_lightning.data.text import tokens
from kd_lightning.data.text.grouped import GroupData
from kd_lightning.data.text.groups import GroupCorpus, TextGroup
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import SentenceEmbedding
from kd_lightning.types import Batch

VERSION = 1
"""Raised when the same groups become other batches."""


class TextColumns:
    """What a batch has of each text beside its tokens, by its `index`.

    Args:
        groups: All of them, in the order of their texts.

    Attributes:
        group: Number of its pair or triplet, `(N,)`.
        place: Its place there: 0 the query, 1 the positive, then negatives, `(N,)`.
        text: A number that equal texts have in common, `(N,)`.
        score: That of its pair, NaN where there is none, `(N,)`.
    """

    def __init__(self, groups: Sequence[TextGroup]) -> None:
        sizes = np.array([len(group.texts) for group in groups])
        self.group = np.repeat(np.arange(len(groups)), sizes)
        self.place = np.arange(len(self.group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        known: dict[str, int] = {}
        texts = [known.setdefault(text, len(known)) for group in groups for text in group.texts]
        self.text = np.array(texts, np.int64)
        self.score = np.repeat(np.array([group.score for group in groups], np.float32), sizes)

    def at(self, index: NDArray[np.int64]) -> Batch:
        """Return the entries of some texts, `(B,)`; labels are of pairs, and no text has one of its own."""
        columns = {"group": self.group, "place": self.place, "text": self.text, "score": self.score}
        found = {name: torch.from_numpy(column[index]) for name, column in columns.items()}
        return {**found, "labels": torch.full((len(index),), torch.nan)}


class EmbeddingData(GroupData):
    """Pairs, triplets and single texts that a student embeds as its teacher does, or from the pairs alone.

    Every text has a stable `index`, and the teacher's embedding is stored for each. A training batch has
    `batch_size` whole groups, so that a query's positive is among its texts; an evaluation goes through the texts by
    length. Scores are of queries, the split's positives and negatives being the corpus.

    Args:
        dimensions: D, how wide the student's embedding is; the teacher has its own width.
        widths: Further widths at which the first entries are an embedding, too (Matryoshka).
        transfer: More texts, for the teacher to embed.
        transfer_examples: How many of the groups that `train_examples` leaves out give their texts to these, each text
            alone; None: all. A smaller choice is part of a larger one.
        options: Those of `GroupData`.

    Raises:
        ConfigError: An option out of its range.
    """

    parts = ("train", "transfer", "validation", "test")
    texts, evaluates_groups = 1, False

    def __init__(
        self,
        dimensions: int = 384,
        widths: Sequence[int] = (),
        transfer: Sequence[str] = (),
        transfer_examples: int | None = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_least(2, dimensions=dimensions)
        check_least(0, transfer_examples=transfer_examples or 0)
        self.transfer_examples = transfer_examples
        self.dimensions, self.widths = dimensions, list(widths)
        self.transfer = [transfer] if isinstance(transfer, str) else list(transfer)
        SentenceEmbedding(dimensions, widths=self.widths)  # refuses widths that are none

    @abstractmethod
    def read(self) -> GroupCorpus:
        """Return the groups of each split, and the transfer texts."""

    def prepare(self) -> None:
        """Read, split and encode everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self.read()
        train, left = self._drawn(corpus.train)
        known = {text for group in (*train, *corpus.transfer) for text in group.texts}
        corpus = replace(corpus, train=train, transfer=[*self._alone(left, known), *corpus.transfer])
        of_parts: dict[str, list[TextGroup]] = {name: getattr(corpus, name) for name in self.parts}
        groups = [group for part in of_parts.values() for group in part]
        self._load_tokenizers([text for group in corpus.train for text in group.texts])
        self._lay_out([sum(len(group.texts) for group in part) for part in of_parts.values()])
        self._columns = TextColumns(groups)
        self._groups = len(corpus.train)
        self._task = SentenceEmbedding(
            self.dimensions, not np.isnan([group.score for group in corpus.test]).all(), self.widths,
            any(len(group.texts) > 1 for group in corpus.train),
        )  # fmt: skip
        self._encode(
            [(text,) for group in groups for text in group.texts],
            {name: [[group.texts, repr(group.score)] for group in part] for name, part in of_parts.items()},
            [VERSION, tokens.VERSION, self.max_length, self.dimensions, self.widths],
        )

    def _alone(self, left: Sequence[TextGroup], known: Set[str]) -> list[TextGroup]:
        """Return the texts of `transfer_examples` of the groups that are left, each once, without known ones."""
        more = self.transfer_examples
        if more is not None and more > len(left):
            raise ConfigError(
                f"data.transfer_examples={more}, but {len(left)} groups are left for it: use fewer, or fewer to train "
                "on (data.train_examples)"
            )
        texts = dict.fromkeys(text for group in left[:more] for text in group.texts)
        return [TextGroup((text,)) for text in texts if text not in known]

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def task(self) -> SentenceEmbedding:
        """An embedding for each text."""
        self.prepare()
        return self._task

    @property
    def title(self) -> str:
        """What the texts are."""
        return "embeddings of scored pairs" if self.task.scored else "embeddings for retrieval"

    def model_arguments(self, role: Role) -> dict[str, Any]:
        """Return a network's arguments from the data: the width of the student's embedding, and the words."""
        return {**super().model_arguments(role), "num_classes": self.dimensions, "embeds": True}

    def encode(self, texts: Sequence[str], role: Role = "student") -> Batch:
        """Return new texts as one batch, `(B, L)`."""
        return self._encoded([(text,) for text in texts], role)

    # -- batches ------------------------------------------------------------------------------------------------------

    def connecting_batch(self) -> Batch:
        """Return `eval_batch_size` training texts, drawn at random whatever their length.

        The principal directions of the teacher's embeddings are those of these texts: of more directions than texts the
        others are arbitrary.
        """
        data = self._dataset("train", "train")
        return data[np.sort(np.random.default_rng(self.seed).permutation(len(data))[: self.eval_batch_size])]
