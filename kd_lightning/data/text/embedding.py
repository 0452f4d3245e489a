"""Texts, pairs and triplets as a `LightningDataModule`, tokenised once, in batches of like length."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset
from kd_lightning.data.datamodule import Role, check_least
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.data.text import tokens
from kd_lightning.data.text.groups import GroupCorpus, TextGroup
from kd_lightning.data.text.tokenized import ROLES, TokenizedData
from kd_lightning.data.text.tokens import (
    TokenStore,
    encode_batch,
    encode_store,
    sentences_digest,
    tokenizer_fingerprint,
)
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import SentenceEmbedding
from kd_lightning.types import Batch

VERSION = 1
"""Raised when the same groups become other batches."""
_ENTRIES = ("input_ids", "special_tokens_mask")


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


class GroupDataset(BatchDataset):
    """A run of texts: whole groups of them in a batch, or texts of like length whatever their groups.

    Args:
        stores: Encoded texts by the prefix of their names in the batch.
        columns: What else a text has.
        span: The texts of this run, of whole groups.
        grouped: Whether a position is that of a group's first text, and stands for all of them.
    """

    def __init__(self, stores: Mapping[str, TokenStore], columns: TextColumns, span: range, grouped: bool) -> None:
        self.stores, self.columns, self.span, self.grouped = stores, columns, span, grouped

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each text, over all tokenizers, `(len(self),)`."""
        total = sum(store.lengths for store in self.stores.values())
        return np.asarray(total)[self.span.start : self.span.stop]

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Positions of the groups' first texts, `(G,)`."""
        return np.flatnonzero(self.columns.place[self.span.start : self.span.stop] == 0)

    def _turn(self, epoch: int) -> Turn:
        """Return each group by its first text, with the length of its longest."""
        if not self.grouped:
            return np.arange(len(self)), self.lengths
        firsts = self.firsts
        return firsts, np.maximum.reduceat(self.lengths, firsts) if len(firsts) else self.lengths

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        index = np.asarray(positions, np.int64) + self.span.start
        if self.grouped:
            ends = np.append(self.firsts, len(self)) + self.span.start
            stops = ends[np.searchsorted(ends, index, side="right")]
            index = np.concatenate([np.arange(start, stop) for start, stop in zip(index, stops, strict=True)])
        encoded = {
            prefix + name: value for prefix, store in self.stores.items() for name, value in store.batch(index).items()
        }
        return encoded | self.columns.at(index) | {"index": torch.from_numpy(index)}


class EmbeddingData(TokenizedData):
    """Pairs, triplets and single texts that a student embeds as its teacher does, or from the pairs alone.

    Every text has a stable `index`, and the teacher's embedding is stored for each. A training batch has
    `batch_size` whole groups, so that a query's positive is among its texts; an evaluation goes through the texts by
    length. Scores are of queries, the split's positives and negatives being the corpus.

    Args:
        dimensions: D, how wide the student's embedding is; the teacher has its own width.
        widths: Further widths at which the first entries are an embedding, too (Matryoshka).
        train_examples: Train on so many groups only, drawn by `split_seed`; None: all.
        transfer: More texts, for the teacher to embed.
        cache_dir: Where tokenised texts are kept; by default under `$KD_LIGHTNING_HOME`.
        options: Those of `TokenizedData`; texts of more than `max_length` tokens are cut.

    Raises:
        ConfigError: An option out of its range.
    """

    parts = ("train", "transfer", "validation", "test")

    def __init__(
        self,
        dimensions: int = 384,
        widths: Sequence[int] = (),
        train_examples: int | None = None,
        transfer: Sequence[str] = (),
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_least(2, dimensions=dimensions)
        check_least(1, train_examples=1 if train_examples is None else train_examples)
        self.dimensions, self.widths, self.train_examples = dimensions, list(widths), train_examples
        self.transfer = [transfer] if isinstance(transfer, str) else list(transfer)
        self.cache_dir = Path(cache_dir) if cache_dir else home() / "tokens"
        self._without_pool = ("train", "validation", "test")
        SentenceEmbedding(dimensions, widths=self.widths)  # refuses widths that are none

    @abstractmethod
    def read(self) -> GroupCorpus:
        """Return the groups of each split, and the transfer texts."""

    def prepare(self) -> None:
        """Read, split and encode everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self._drawn(self.read())
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
        self._encode(of_parts)

    def _drawn(self, corpus: GroupCorpus) -> GroupCorpus:
        """Return the corpus with `train_examples` training groups."""
        wanted = self.train_examples
        if wanted is None:
            return corpus
        if wanted > len(corpus.train):
            raise ConfigError(f"data.train_examples={wanted}, but there are {len(corpus.train)} to train on")
        chosen = np.random.default_rng(self.split_seed).permutation(len(corpus.train))[:wanted]
        return replace(corpus, train=[corpus.train[i] for i in np.sort(chosen)])

    def _encode(self, of_parts: Mapping[str, list[TextGroup]]) -> None:
        """Encode all texts, and set the fingerprints: of all data, without the pool, and for teacher outputs."""
        sentences = [(text,) for part in of_parts.values() for group in part for text in group.texts]
        content = sentences_digest(sentences).hexdigest()
        prints = [tokenizer_fingerprint(self.tokenizer_of(role)) for role in ROLES]
        self._stores: dict[str, TokenStore] = {}
        for role in ROLES[: 1 + self.has_two_tokenizers]:
            tokenizer = self.tokenizer_of(role)
            self._stores[role] = encode_store(tokenizer, sentences, content, self.max_length, self.cache_dir)
        self._stores.setdefault("teacher", self._stores["student"])
        self.teacher_key = {
            "sentences": content, "examples": len(sentences), "tokens": tokens.VERSION, "tokenizer": prints[1],
            "max_length": self.max_length, "truncation": self.teacher_tokenizer.truncation_side,
        }  # fmt: skip
        reading = [VERSION, tokens.VERSION, self.max_length, self.dimensions, self.widths]
        reading += [self.tokenizer_of(role).truncation_side for role in ROLES]
        for pool, names in ((True, self.parts), (False, self._without_pool)):
            kept = {name: [[group.texts, repr(group.score)] for group in of_parts[name]] for name in names}
            self._fingerprints[pool] = _sha256([kept, reading, prints])
            self._labelled = _sha256(kept)  # without the pool, and for any tokenizer
        self.fingerprint = self._fingerprints[True]

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

    @property
    def labelled_examples(self) -> int:
        """Number of training groups: an epoch, as settings count them."""
        return self._groups

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of the teacher's tokens of each text, `(num_examples,)`."""
        return self._stores["teacher"].lengths

    def model_arguments(self, role: Role) -> dict[str, Any]:
        """Return a network's arguments from the data: the width of the student's embedding, and the words.

        Of a static embedding also the tokens around a text, and a text of one token, -1 in that token's place.
        """
        found, encoded = super().model_arguments(role), self.tokenizer_of(role)("a", return_special_tokens_mask=True)
        special = [token for token, is_one in zip(*map(encoded.get, _ENTRIES), strict=True) if is_one]
        before = encoded["special_tokens_mask"].index(0) if 0 in encoded["special_tokens_mask"] else 0
        template = [*special[:before], -1, *special[before:]]
        around = {"special_tokens": sorted(set(special)), "single_token": template}
        return {**found, **around, "num_classes": self.dimensions, "embeds": True}

    @property
    def input_format(self) -> dict[str, Any]:
        """The longest text in tokens, and that an example is one text."""
        return {"max_length": self.max_length, "texts": 1}

    def encode(self, texts: Sequence[str], role: Role = "student") -> Batch:
        """Return new texts as one batch, `(B, L)`."""
        self.prepare()
        return encode_batch(self.tokenizer_of(role), [(text,) for text in texts], self.max_length)

    def folds(self, count: int) -> NDArray[np.int64]:
        """Refuse: pairs of one fold are negatives of another.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"teacher.folds={count}: teachers of embeddings have no folds; set teacher.folds=1")

    def with_one_reader(self) -> Self:
        """Return the same data for a teacher with the student's tokens."""
        chosen = self._copy()
        tokenizer = chosen.teacher_tokenizer = self.student_tokenizer
        chosen.tokenizer_names = dict.fromkeys(ROLES, self.tokenizer_names["student"])
        chosen._stores = dict.fromkeys(ROLES, self._stores["student"])
        own = {"tokenizer": tokenizer_fingerprint(tokenizer), "truncation": tokenizer.truncation_side}
        chosen.teacher_key = {**self.teacher_key, **own}
        return chosen

    # -- batches ------------------------------------------------------------------------------------------------------

    def few(self) -> Batch:
        """Return a batch of a few whole groups of the validation split."""
        self.prepare()
        data = self._dataset("validation", "validation", grouped=True)
        return data[data.firsts[:4]]

    def connecting_batch(self) -> Batch:
        """Return `eval_batch_size` training texts, drawn at random whatever their length.

        The principal directions of the teacher's embeddings are those of these texts: of more directions than texts the
        others are arbitrary.
        """
        data = self._dataset("train", "train")
        return data[np.sort(np.random.default_rng(self.seed).permutation(len(data))[: self.eval_batch_size])]

    def _training_dataset(self) -> GroupDataset:
        return self._dataset("train", "transfer" if self._pool else "train", grouped=True)

    def _dataset(self, first: str, last: str, grouped: bool = False) -> GroupDataset:
        self.prepare()
        stores = {prefix: self._stores[role] for prefix, role in self._readers().items()}
        return GroupDataset(stores, self._columns, range(self._spans[first].start, self._spans[last].stop), grouped)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
