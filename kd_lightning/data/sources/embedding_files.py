"""The user's own texts, pairs or triplets: files, or a data set of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from kd_lightning.data.sources.group_reader import GroupReader
from kd_lightning.data.sources.hf_dataset import read_parts
from kd_lightning.data.sources.records import Format
from kd_lightning.data.text.embedding import EmbeddingData
from kd_lightning.data.text.groups import GroupCorpus, assemble_texts


class EmbeddingFiles(EmbeddingData):
    """Texts, pairs or triplets in files, or in a data set that `datasets` can load.

    Files are CSV, TSV, JSON, Parquet or text, also compressed (.gz). A record with an empty positive is a single text,
    from which only a teacher's output is learned. Where a validation or test file is not given, a part of the training
    groups is held out; groups with a text in common stay together.

    Args:
        train_file: The groups to train on.
        validation_file: Those to select on.
        test_file: Those to report on.
        name: Instead of files the name of a data set, or a folder written by `save_to_disk`: its splits `train`,
            `validation` (or `valid`, `val`, `dev`) and `test`.
        config_name: Which of the data set's configurations.
        text_column: The column with the query, or the text.
        positive_column: That with what belongs to it; None: texts are single.
        negative_column: That with what does not; in JSONL and Parquet a text or a list of texts; None: none.
        score_column: Of pairs, how similar they are; None: pairs belong together.
        most_score: The score of pairs that mean the same, such as 5 of STS benchmarks.
        format: The files' format; by default by the suffix.
        encoding: Of the text formats.
        quotes: Whether `"` opens a quoted field in CSV and TSV.
        validation_fraction: How much to hold out for a missing validation file.
        test_fraction: How much to hold out for a missing test file.
        options: Those of `EmbeddingData`; `transfer` takes files, of which .txt holds a text a line.
    """

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        name: str | None = None,
        config_name: str | None = None,
        text_column: str = "text",
        positive_column: str | None = None,
        negative_column: str | None = None,
        score_column: str | None = None,
        most_score: float = 1.0,
        format: Format | None = None,
        encoding: str = "utf-8",
        quotes: bool = True,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.files = {"train": train_file, "validation": validation_file, "test": test_file}
        self.dataset_name, self.config_name = name, config_name
        self.reader = GroupReader(
            text_column, positive_column, negative_column, score_column, most_score, format, encoding, quotes
        )
        self.fractions = validation_fraction, test_fraction

    def read(self) -> GroupCorpus:
        """Read the files or the data set, and hold out what is missing."""
        found = read_parts(
            self.files, self.dataset_name, self.config_name,
            lambda path, part: self.reader.groups(path),
            lambda splits, split, name, part: self.reader.split(splits, split, name),
        )  # fmt: skip
        train = found["train"]
        assert train is not None
        return assemble_texts(
            train, found["validation"], found["test"], fractions=self.fractions, split_seed=self.split_seed,
            origin=self.dataset_name or str(self.files["train"]),
            transfer=[text for path in self.transfer for text in self.reader.texts(path)],
        )  # fmt: skip
