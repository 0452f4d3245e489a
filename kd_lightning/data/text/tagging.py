"""Tagged texts as a `LightningDataModule`: read, split, tokenised once, in windows of like length."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.datamodule import Role, check_least
from kd_lightning.data.text.tagged import TaggedCorpus, TaggedText
from kd_lightning.data.text.tokenized import ROLES, TokenizedData
from kd_lightning.data.text.tokens import load_tokenizer, tokenizer_fingerprint
from kd_lightning.data.text.words import VERSION, Windows, WordDataset, encode_words
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.tasks import TokenClassification
from kd_lightning.types import IGNORE

Label = Literal["first", "all"]


class TaggedData(TokenizedData):
    """Texts with a tag for each word, and texts without that only a teacher tags.

    An example is a window of at most `max_length` tokens: a longer text has several, which overlap. Each word counts in
    the one window that shows most around it. Scores are of whole texts.

    Args:
        label: Which tokens of a word learn its tag: its `first`, or `all`; the later ones of a B then learn its I.
            Scores and predictions are of the first.
        stride: How many tokens two windows of a text share.
        transfer: More texts, for the teacher to tag.
        max_length: The longest window in tokens.
        options: Those of `TokenizedData`. Student and teacher read the same tokens.

    Raises:
        ConfigError: An option out of its range.
    """

    parts = ("train", "transfer", "validation", "test")

    def __init__(
        self,
        label: Label = "first",
        stride: int = 32,
        transfer: Sequence[str] = (),
        max_length: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(max_length=max_length, **options)
        check_least(0, stride=stride)
        if label not in get_args(Label):
            raise ConfigError(f"data.label={label!r} is unknown{did_you_mean(str(label), get_args(Label))}")
        self.label, self.stride = label, stride
        self.transfer = [transfer] if isinstance(transfer, str) else list(transfer)
        self._without_pool = ("train", "validation", "test")

    @abstractmethod
    def read(self) -> TaggedCorpus:
        """Return the tags and the tagged and untagged texts."""

    def prepare(self) -> None:
        """Read, split and encode everything; a second call does nothing."""
        if self.fingerprint:
            return
        corpus = self.read()
        self.class_names = corpus.tags
        self._load_tokenizers([text.text for text in corpus.train])
        prints = {tokenizer_fingerprint(self.tokenizer_of(role)) for role in ROLES}
        if len(prints) > 1:
            raise ConfigError(
                f"data.teacher_tokenizer={self.tokenizer_names['teacher']!r} reads other tokens than the student's "
                f"{self.tokenizer_names['student']!r}: tags are compared token by token; give both the same tokenizer"
            )
        of_parts: dict[str, list[TaggedText]] = {name: getattr(corpus, name) for name in self.parts}
        texts = [text for part in of_parts.values() for text in part]
        self._windows = encode_words(self.student_tokenizer, texts, self.max_length, self.stride)
        begins = np.cumsum([0, *map(len, of_parts.values())])
        self._lay_out(np.diff(np.searchsorted(self._windows.texts, begins)).tolist())
        self._labels = self._token_labels(texts)
        self._name_all(of_parts, prints.pop())

    def _token_labels(self, texts: Sequence[TaggedText]) -> NDArray[np.int64]:
        """Return the class of each token of a word, `IGNORE` for any other."""
        code = {tag: number for number, tag in enumerate(self.class_names)}
        inner = np.array([code.get("I" + tag[1:], code[tag]) if tag[0] == "B" else code[tag] for tag in code])
        tags = [[IGNORE] * len(text.words) if text.tags is None else [code[tag] for tag in text.tags] for text in texts]
        starts = np.cumsum([0, *map(len, tags)])[:-1]
        owner = np.repeat(self._windows.texts, self._windows.lengths)
        flat = np.concatenate([np.asarray(codes, np.int64) for codes in tags])
        counts = self._windows.words >= 0
        labels = np.full(len(owner), IGNORE, np.int64)
        labels[counts] = flat[starts[owner[counts]] + self._windows.words[counts]]
        later = (labels != IGNORE) & ~self._windows.begins
        labels[later] = inner[labels[later]]
        return labels

    def _name_all(self, of_parts: dict[str, list[TaggedText]], tokenizer: str) -> None:
        """Name the data with the pool and without, and as far as a teacher's outputs depend on them."""
        reading = {
            "words": VERSION, "tokenizer": tokenizer, "max_length": self.max_length, "stride": self.stride,
            "label": self.label,
        }  # fmt: skip
        for pool, names in ((True, self.parts), (False, self._without_pool)):
            content = {name: [[text.text, text.words, text.tags] for text in of_parts[name]] for name in names}
            self._fingerprints[pool] = _sha256([content, self.class_names, reading])
        self.fingerprint, self._labelled = self._fingerprints[True], self._fingerprints[False]
        words = [[text.text, text.words] for part in of_parts.values() for text in part]
        self.teacher_key = {"texts": _sha256(words), "examples": len(self._windows), **reading}

    # -- what models need to know -------------------------------------------------------------------------------------

    @property
    def task(self) -> TokenClassification:
        """A tag for each word."""
        return TokenClassification(self.class_names)

    @property
    def title(self) -> str:
        """The types of entities."""
        return " / ".join(self.task.types)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each window, `(num_examples,)`."""
        return self._windows.lengths

    @property
    def windows(self) -> Windows:
        """All windows, by `index`."""
        return self._windows

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return what the data decide about a network: beside its sizes that it predicts for each token."""
        return {**super().model_arguments(role), "per_token": True}

    @property
    def input_format(self) -> dict[str, Any]:
        """The longest window in tokens, and that an example is one text."""
        return {"max_length": self.max_length, "texts": 1}

    def reading(self, tokenizer: str) -> Self:
        """Return these data, whose teacher reads what the student reads.

        Raises:
            ConfigError: It is to read with another tokenizer.
        """
        self.prepare()
        if tokenizer_fingerprint(load_tokenizer(tokenizer, [])) != self.teacher_key["tokenizer"]:
            raise ConfigError(
                f"the teacher's tokenizer {tokenizer!r} is not the student's: tags are compared token by token; set "
                f"data.tokenizer={tokenizer}"
            )
        return self

    # -- batches ------------------------------------------------------------------------------------------------------

    def _training_dataset(self) -> WordDataset:
        return self._trained_on(self._dataset("train", "transfer" if self._pool else "train"))

    def _dataset(self, first: str, last: str) -> WordDataset:
        self.prepare()
        span = range(self._spans[first].start, self._spans[last].stop)
        pad = int(self.student_tokenizer.pad_token_id)
        return WordDataset(self._windows, self._labels, self.label == "all", span, pad)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
