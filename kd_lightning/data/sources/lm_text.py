"""The user's own running text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.data.corpus.datamodule import CorpusData
from kd_lightning.data.corpus.documents import DocumentReader, FileDocuments
from kd_lightning.data.corpus.store import Source
from kd_lightning.data.sources.hf_dataset import load_splits, usual_splits
from kd_lightning.data.sources.records import Format
from kd_lightning.runtime.errors import ConfigError


class OwnDocuments(CorpusData):
    """Documents of the user's own files, or of a data set that `datasets` can load.

    A subclass sets `reader`, which knows how the files are written.

    Args:
        train_file: A file or a folder, or several, of the documents to train on.
        validation_file: Those to select on; None holds out some of the others.
        test_file: Those to report on; None holds out some of the others.
        name: Instead of files the name of a data set, or a folder written by `save_to_disk`: its splits `train`,
            `validation` (or `valid`, `val`, `dev`) and `test`.
        config_name: Which of the data set's configurations.
        options: Those of `CorpusData`.

    Raises:
        ConfigError: Files and a data set, or neither.
    """

    reader: FileDocuments

    def __init__(
        self,
        train_file: str | Sequence[str] | None = None,
        validation_file: str | Sequence[str] | None = None,
        test_file: str | Sequence[str] | None = None,
        name: str | None = None,
        config_name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = {"train": train_file, "validation": validation_file, "test": test_file}
        self.files = {
            part: [paths] if isinstance(paths, str) else list(paths) for part, paths in given.items() if paths
        }
        if ("train" in self.files) == (name is not None) or (name is not None and self.files):
            raise ConfigError("give data.train_file (and validation_file, test_file) or data.name, one of the two")
        self.dataset_name, self.config_name = name, config_name

    def sources(self) -> Mapping[str, Source]:
        """Return the documents of the files, or of the data set."""
        if self.dataset_name is None:
            return {part: self.reader.source(paths, f"{part}_file") for part, paths in self.files.items()}
        name = self.dataset_name
        splits = load_splits(name, self.config_name)
        return {
            part: self.reader.table(splits[split], name, split) for part, split in usual_splits(splits, name).items()
        }


class LMTextData(OwnDocuments):
    """Documents in text files, JSON, Parquet, CSV or TSV files, or folders of them, for language models.

    A text file is one document; in the other formats, and in a data set, each record is. Files may be compressed
    (.jsonl.gz).

    Args:
        train_file: A file or a folder, or several, of the documents to train on.
        validation_file: Those to select on; None holds out some of the others.
        test_file: Those to report on; None holds out some of the others.
        text_column: The key or column with the text.
        format: The files' format; by default from the suffix.
        encoding: Of the text formats.
        options: Those of `OwnDocuments`.
    """

    def __init__(
        self,
        train_file: str | Sequence[str] | None = None,
        validation_file: str | Sequence[str] | None = None,
        test_file: str | Sequence[str] | None = None,
        text_column: str = "text",
        format: Format | None = None,
        encoding: str = "utf-8",
        **options: Any,
    ) -> None:
        super().__init__(train_file, validation_file, test_file, **options)
        self.reader = DocumentReader(text_column, format, encoding)
