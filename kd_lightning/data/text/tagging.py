"""Tagged texts as a `LightningDataModule`: read, split, tokenised once, in windows of like length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.datamodule import Role
from kd_lightning.data.options import check_least
from kd_lightning.data.text.tagged import TaggedCorpus, TaggedText
from kd_lightning.data.text.tokenized import ROLES, TokenizedData
from kd_lightning.data.text.tokens import tokenizer_fingerprint
from kd_lightning.data.text.words import VERSION, Windows, WordDataset, encode_alike
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.runtime.fingerprints import content_digest
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
        options: Those of `TokenizedData`. Where student and teacher have other tokenizers, their windows have the same
            words, and a word's first tokens correspond.

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
        prints = [tokenizer_fingerprint(self.tokenizer_of(role)) for role in ROLES]
        if prints[0] != prints[1] and self.label == "all":
            raise ConfigError(
                f"data.label=all: the teacher's tokenizer {self.tokenizer_names['teacher']!r} makes other tokens of a "
                f"word than the student's {self.tokenizer_names['student']!r}, and only first ones correspond; set "
                "data.label=first"
            )
        of_parts: dict[str, list[TaggedText]] = {name: getattr(corpus, name) for name in self.parts}
        texts = [text for part in of_parts.values() for text in part]
        tokenizers = [self.tokenizer_of(role) for role in ROLES[: len(set(prints))]]
        encoded = encode_alike(tokenizers, texts, self.max_length, self.stride)
        self._stores: dict[Role, Windows] = {"student": encoded[0], "teacher": encoded[-1]}
        begins = np.cumsum([0, *map(len, of_parts.values())])
        self._lay_out(np.diff(np.searchsorted(encoded[0].texts, begins)).tolist())
        self._labels: dict[Role, NDArray[np.int64]] = {
            role: self._token_labels(texts, windows) for role, windows in self._stores.items()
        }
        self._name_all(of_parts, prints)

    def _token_labels(self, texts: Sequence[TaggedText], windows: Windows) -> NDArray[np.int64]:
        """Return the class of each token of a word, `IGNORE` for any other."""
        code = {tag: number for number, tag in enumerate(self.class_names)}
        inner = np.array([code.get("I" + tag[1:], code[tag]) if tag[0] == "B" else code[tag] for tag in code])
        tags = [[IGNORE] * len(text.words) if text.tags is None else [code[tag] for tag in text.tags] for text in texts]
        starts = np.cumsum([0, *map(len, tags)])[:-1]
        owner = np.repeat(windows.texts, windows.lengths)
        flat = np.concatenate([np.asarray(codes, np.int64) for codes in tags])
        counts = windows.words >= 0
        labels = np.full(len(owner), IGNORE, np.int64)
        labels[counts] = flat[starts[owner[counts]] + windows.words[counts]]
        later = (labels != IGNORE) & ~windows.begins
        labels[later] = inner[labels[later]]
        return labels

    def _name_all(self, of_parts: dict[str, list[TaggedText]], tokenizers: list[str]) -> None:
        """Name the data with the pool and without, and as far as a teacher's outputs depend on them.

        Where a text has several windows these depend on both tokenizers, and a teacher's outputs with them.
        """
        student, teacher = tokenizers
        cut = bool((self.windows.cut >= 0).any())
        reading = {
            "words": VERSION, "tokenizer": teacher, "max_length": self.max_length, "stride": self.stride,
            "label": self.label, "cut_by": sorted({student, teacher}) if cut else None,
        }  # fmt: skip
        for pool, names in ((True, self.parts), (False, self._without_pool)):
            content = {name: [[text.text, text.words, text.tags] for text in of_parts[name]] for name in names}
            self._fingerprints[pool] = content_digest([content, self.class_names, reading, student])
        self.fingerprint, self._labelled = self._fingerprints[True], self._fingerprints[False]
        words = [[text.text, text.words] for part in of_parts.values() for text in part]
        self.teacher_key = {"texts": content_digest(words), "examples": len(self.windows), **reading}

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
        """Number of the teacher's tokens in each window, `(num_examples,)`."""
        return self._stores["teacher"].lengths

    @property
    def windows(self) -> Windows:
        """All windows, by `index`, as the student reads them."""
        return self._stores["student"]

    def model_arguments(self, role: Role) -> dict[str, int]:
        """Return what the data decide about a network: beside its sizes that it predicts for each token."""
        return {**super().model_arguments(role), "per_token": True}

    @property
    def input_format(self) -> dict[str, Any]:
        """The longest window in tokens, and that an example is one text."""
        return {"max_length": self.max_length, "texts": 1}

    def with_one_reader(self) -> Self:
        """Return the same windows for a teacher with the student's tokens."""
        chosen = super().with_one_reader()
        chosen._labels = dict.fromkeys(ROLES, self._labels["student"])
        return chosen

    def reading(self, tokenizer: str) -> Self:
        """Return the same data for a teacher with another tokenizer; itself if it already has it.

        Raises:
            ConfigError: For it long texts have other windows.
        """
        other = super().reading(tokenizer)
        if not np.array_equal(other.windows.words, self.windows.words):
            raise ConfigError(
                f"teacher.checkpoint: with the tokenizer {tokenizer!r} texts of more than data.max_length="
                f"{self.max_length} tokens are cut elsewhere than for the other teachers; raise data.max_length"
            )
        return other

    # -- batches ------------------------------------------------------------------------------------------------------

    def _training_dataset(self) -> WordDataset:
        return self._trained_on(self._dataset("train", "transfer" if self._pool else "train"))

    def _dataset(self, first: str, last: str) -> WordDataset:
        self.prepare()
        span = range(self._spans[first].start, self._spans[last].stop)
        readers = self._readers()
        windows = {prefix: self._stores[role] for prefix, role in readers.items()}
        padding = {prefix: int(self.tokenizer_of(role).pad_token_id) for prefix, role in readers.items()}
        return WordDataset(windows, self._labels[readers[""]], self.label == "all", span, padding)
