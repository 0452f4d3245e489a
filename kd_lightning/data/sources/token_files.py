"""The user's own tagged texts: files, or a data set of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from kd_lightning.data.sources.hf_dataset import read_parts
from kd_lightning.data.sources.tagged_dataset import tagged_split
from kd_lightning.data.sources.tagged_files import TaggedFormat, TaggedReader
from kd_lightning.data.text.tagged import TaggedCorpus, assemble_tagged
from kd_lightning.data.text.tagging import TaggedData
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.tasks.entities import Scheme, scheme_of


class TokenFiles(TaggedData):
    """Tagged texts in files of CoNLL columns, JSONL or Parquet, or in a data set that `datasets` can load.

    In a CoNLL file a line has a word and, last, its tag, and a blank line ends a text. In JSONL and Parquet a record
    has words and their tags, or a text and its entities as runs of characters. Where a validation or test file is not
    given, a part of the training texts is held out, after texts that come again are dropped from them.

    Args:
        train_file: The tagged texts to train on.
        validation_file: Those to select on.
        test_file: Those to report on.
        name: Instead of files the name of a data set, or a folder written by `save_to_disk`: its splits `train`,
            `validation` (or `valid`, `val`, `dev`) and `test`.
        config_name: Which of the data set's configurations.
        tokens_column: The column with the words.
        tags_column: That with their tags: names, or numbers of classes.
        text_column: Instead of words the column with a text.
        spans_column: That with its entities: objects with `start`, `end` (in characters) and `label`.
        class_names: The tags in the order of their numbers; by default those of the types found, sorted.
        scheme: How the tags mark entities: `bio`, `bioes` or `io`; by default as the tags show. Spans become `bio`.
        format: The files' format, `conll`, `jsonl` or `parquet`; by default by the suffix.
        encoding: Of the text formats.
        validation_fraction: How much to hold out for a missing validation file.
        test_fraction: How much to hold out for a missing test file.
        options: Those of `TaggedData`; `transfer` takes files, of which .txt holds a text a line.
    """

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        name: str | None = None,
        config_name: str | None = None,
        tokens_column: str = "tokens",
        tags_column: str = "tags",
        text_column: str | None = None,
        spans_column: str = "spans",
        class_names: list[str] | None = None,
        scheme: Scheme | None = None,
        format: TaggedFormat | None = None,
        encoding: str = "utf-8",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if scheme not in (None, "bio", "bioes", "io"):
            raise ConfigError(f"data.scheme={scheme!r} is unknown{did_you_mean(str(scheme), ('bio', 'bioes', 'io'))}")
        self.files = {"train": train_file, "validation": validation_file, "test": test_file}
        self.dataset_name, self.config_name = name, config_name
        self.given_class_names = None if class_names is None else [str(name) for name in class_names]
        self.scheme = scheme
        written = scheme or (scheme_of(self.given_class_names) if self.given_class_names else "bio")
        names = tuple(self.given_class_names or ())
        columns = (tokens_column, tags_column, text_column, spans_column)
        self.reader = TaggedReader(*columns, written, names, format, encoding)
        self.fractions = validation_fraction, test_fraction

    def read(self) -> TaggedCorpus:
        """Read the files or the data set, and hold out what is missing."""
        found = read_parts(
            self.files, self.dataset_name, self.config_name,
            lambda path, part: self.reader.tagged(path),
            lambda splits, split, name, part: tagged_split(splits, split, name, self.reader),
        )  # fmt: skip
        train = found["train"]
        assert train is not None
        return assemble_tagged(
            train, found["validation"], found["test"], class_names=self.given_class_names, scheme=self.scheme,
            fractions=self.fractions, split_seed=self.split_seed,
            transfer=[text for path in self.transfer for text in self.reader.untagged(path)],
        )  # fmt: skip
