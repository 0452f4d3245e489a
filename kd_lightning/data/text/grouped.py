"""Texts, or pairs of them, in groups that a training batch holds whole: what such data share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset
from kd_lightning.data.datamodule import Role
from kd_lightning.data.options import check_least
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.data.text import tokens
from kd_lightning.data.text.corpus import Sentence
from kd_lightning.data.text.tokenized import ROLES, TokenizedData
from kd_lightning.data.text.tokens import (
    TokenStore,
    around_text,
    encode_batch,
    encode_store,
    sentences_digest,
    tokenizer_fingerprint,
)
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import content_digest
from kd_lightning.types import Batch

Group = TypeVar("Group")


class Columns(Protocol):
    """What a batch has of each row beside its tokens.

    Attributes:
        place: Its place in its group, 0 for the first, `(N,)`.
    """

    place: NDArray[np.int64]

    def at(self, index: NDArray[np.int64]) -> Batch:
        """Return the entries of some rows, `(B,)`."""


class GroupDataset(BatchDataset):
    """A run of rows: whole groups of them in a batch, or rows of like length whatever their groups.

    Args:
        stores: Encoded rows by the prefix of their names in the batch.
        columns: What else a row has.
        span: The rows of this run, of whole groups.
        grouped: Whether a position is that of a group's first row, and stands for all of them.
    """

    def __init__(self, stores: Mapping[str, TokenStore], columns: Columns, span: range, grouped: bool) -> None:
        self.stores, self.columns, self.span, self.grouped = stores, columns, span, grouped

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row, over all tokenizers, `(len(self),)`."""
        total = sum(store.lengths for store in self.stores.values())
        return np.asarray(total)[self.span.start : self.span.stop]

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Positions of the groups' first rows, `(G,)`."""
        return np.flatnonzero(self.columns.place[self.span.start : self.span.stop] == 0)

    @property
    def whole(self) -> Turn:
        """Each group by its first row, with the length of its longest; or each row."""
        if not self.grouped:
            return super().whole
        firsts = self.firsts
        return firsts, np.maximum.reduceat(self.lengths, firsts) if len(firsts) else self.lengths

    def _turn(self, epoch: int) -> Turn:
        return self.whole

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


class GroupData(TokenizedData):
    """Groups of texts, or of pairs of texts, of which a training batch has `batch_size` whole ones.

    Args:
        train_examples: Train on so many groups only, drawn by `split_seed`; None: all.
        cache_dir: Where tokenised texts are kept; by default under `$KD_LIGHTNING_HOME`.
        options: Those of `TokenizedData`; texts of more than `max_length` tokens are cut.

    Raises:
        ConfigError: An option out of its range.

    Attributes:
        texts: How many texts a row has.
        evaluates_groups: Whether a batch of an evaluation has whole groups, too, `eval_batch_size` of them.
    """

    texts: int
    evaluates_groups: bool
    _columns: Columns
    _groups: int

    def __init__(self, train_examples: int | None = None, cache_dir: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        check_least(1, train_examples=1 if train_examples is None else train_examples)
        self.train_examples = train_examples
        self.cache_dir = Path(cache_dir) if cache_dir else home() / "tokens"
        self._without_pool = tuple(name for name in self.parts if name != "transfer")

    def _drawn(self, train: list[Group]) -> tuple[list[Group], list[Group]]:
        """Return `train_examples` of the training groups in their order, and the others at random."""
        wanted = self.train_examples
        if wanted is None:
            return train, []
        if wanted > len(train):
            raise ConfigError(f"data.train_examples={wanted}, but there are {len(train)} to train on")
        order = np.random.default_rng(self.split_seed).permutation(len(train))
        return [train[i] for i in np.sort(order[:wanted])], [train[i] for i in order[wanted:]]

    def _encode(self, rows: Sequence[Sentence], kept: Mapping[str, Any], reading: Sequence[Any]) -> None:
        """Encode all rows, and set the fingerprints: of all data, without the pool, and for teacher outputs.

        Args:
            rows: The texts of each row, by `index`.
            kept: What each split has beside them, by its name, as JSON can hold it.
            reading: What else decides what a batch is.
        """
        content = sentences_digest(rows).hexdigest()
        prints = [tokenizer_fingerprint(self.tokenizer_of(role)) for role in ROLES]
        self._stores: dict[Role, TokenStore] = {}
        for role in ROLES[: 1 + self.has_two_tokenizers]:
            tokenizer = self.tokenizer_of(role)
            self._stores[role] = encode_store(tokenizer, rows, content, self.max_length, self.cache_dir)
        self._stores.setdefault("teacher", self._stores["student"])
        self.teacher_key = {
            "sentences": content, "examples": len(rows), "tokens": tokens.VERSION, "tokenizer": prints[1],
            "max_length": self.max_length, "truncation": self.teacher_tokenizer.truncation_side,
        }  # fmt: skip
        sides = [self.tokenizer_of(role).truncation_side for role in ROLES]
        for pool, names in ((True, self.parts), (False, self._without_pool)):
            own = {name: kept[name] for name in names}
            self._fingerprints[pool] = content_digest([own, [*reading, *sides], prints])
            self._labelled = content_digest(own)  # without the pool, and for any tokenizer
        self.fingerprint = self._fingerprints[True]

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def labelled_examples(self) -> int:
        """Number of training groups: an epoch, as settings count them."""
        return self._groups

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of the teacher's tokens of each row, `(num_examples,)`."""
        return self._stores["teacher"].lengths

    @property
    def input_format(self) -> dict[str, Any]:
        """The longest input in tokens, and how many texts it has."""
        return {"max_length": self.max_length, "texts": self.texts}

    def model_arguments(self, role: Role) -> dict[str, Any]:
        """Return a network's arguments from the data.

        For static embeddings also the tokens around a text, and a text of one token, -1 in that token's place.
        """
        before, behind = around_text(self.tokenizer_of(role))
        around = {"special_tokens": sorted({*before, *behind}), "single_token": [*before, -1, *behind]}
        return {**super().model_arguments(role), **around}

    def _encoded(self, rows: Sequence[Sentence], role: Role) -> Batch:
        self.prepare()
        return encode_batch(self.tokenizer_of(role), rows, self.max_length)

    def folds(self, count: int) -> NDArray[np.int64]:
        """Refuse: texts of one fold may be another's.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"teacher.folds={count}: data in groups of texts have no folds; set teacher.folds=1")

    # -- batches ------------------------------------------------------------------------------------------------------

    def few(self) -> Batch:
        """Return a batch of a few whole groups of the validation split."""
        self.prepare()
        data = self._dataset("validation", "validation", grouped=True)
        return data[data.firsts[:4]]

    def _training_dataset(self) -> GroupDataset:
        pooled = self._pool and "transfer" in self.parts
        return self._dataset("train", "transfer" if pooled else "train", grouped=True)

    def _dataset(self, first: str, last: str, grouped: bool | None = None) -> GroupDataset:
        self.prepare()
        stores = {prefix: self._stores[role] for prefix, role in self._readers().items()}
        span = range(self._spans[first].start, self._spans[last].stop)
        return GroupDataset(stores, self._columns, span, self.evaluates_groups if grouped is None else grouped)
