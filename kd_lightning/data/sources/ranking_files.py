"""The user's own queries with documents: files, or a data set of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from kd_lightning.data.sources.hf_dataset import read_parts
from kd_lightning.data.sources.list_reader import ListReader
from kd_lightning.data.sources.records import Format
from kd_lightning.data.text.lists import ListCorpus, assemble_lists
from kd_lightning.data.text.ranking import RankingData


class RankingFiles(RankingData):
    """Queries with documents in files, or in a data set that `datasets` can load.

    Files are CSV, TSV, JSON or Parquet, also compressed (.gz). A record is a query with a document and its grade, or
    with relevant documents and others. Where a validation or test file is not given, a part of the training queries is
    held out. Queries of validation and test need a relevant document.

    Args:
        train_file: The queries to train on.
        validation_file: Those to select on.
        test_file: Those to report on.
        name: Instead of files the name of a data set, or a folder written by `save_to_disk`: its splits `train`,
            `validation` (or `valid`, `val`, `dev`) and `test`.
        config_name: Which of the data set's configurations.
        query_column: The column with the query.
        document_column: That with a document, or in JSONL and Parquet a list of them.
        grade_column: That with how relevant it is, 0 for not at all, or a list.
        positive_column: Instead of these two the column with relevant documents, a text or a list.
        negative_column: That with documents that are not; None: none is given.
        format: The files' format; by default by the suffix.
        encoding: Of the text formats.
        quotes: Whether `"` opens a quoted field in CSV and TSV.
        validation_fraction: How much to hold out for a missing validation file.
        test_fraction: How much to hold out for a missing test file.
        options: Those of `RankingData`.
    """

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        name: str | None = None,
        config_name: str | None = None,
        query_column: str = "query",
        document_column: str | None = None,
        grade_column: str | None = None,
        positive_column: str | None = None,
        negative_column: str | None = None,
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
        self.reader = ListReader(
            query_column, document_column, grade_column, positive_column, negative_column, format, encoding, quotes
        )
        self.fractions = validation_fraction, test_fraction

    def read(self) -> ListCorpus:
        """Read the files or the data set, and hold out what is missing."""
        found = read_parts(
            self.files, self.dataset_name, self.config_name,
            lambda path, part: self.reader.lists(path, part != "train"),
            lambda splits, split, name, part: self.reader.split(splits, split, name, part != "train"),
        )  # fmt: skip
        train = found["train"]
        assert train is not None
        return assemble_lists(
            train, found["validation"], found["test"], fractions=self.fractions, split_seed=self.split_seed,
            origin=self.dataset_name or str(self.files["train"]),
        )  # fmt: skip
