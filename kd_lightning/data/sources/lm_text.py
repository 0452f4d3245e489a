"""The user's own running text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.data.corpus.datamodule import CorpusData
from kd_lightning.data.corpus.documents import DocumentReader
from kd_lightning.data.corpus.store import Source
from kd_lightning.data.sources.records import Format


class LMTextData(CorpusData):
    """Documents in text files, JSON, Parquet, CSV or TSV files, or folders of them, for language models.

    A text file is one document; in the other formats each record is. Files may be compressed (.jsonl.gz).

    Args:
        train_file: A file or a folder, or several, of the documents to train on.
        validation_file: Those to select on; None holds out some of the others.
        test_file: Those to report on; None holds out some of the others.
        text_column: The key or column with the text.
        format: The files' format; by default from the suffix.
        encoding: Of the text formats.
        options: Those of `CorpusData`.
    """

    def __init__(
        self,
        train_file: str | Sequence[str],
        validation_file: str | Sequence[str] | None = None,
        test_file: str | Sequence[str] | None = None,
        text_column: str = "text",
        format: Format | None = None,
        encoding: str = "utf-8",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = {"train": train_file, "validation": validation_file, "test": test_file}
        self.files = {
            part: [paths] if isinstance(paths, str) else list(paths) for part, paths in given.items() if paths
        }
        self.reader = DocumentReader(text_column, format, encoding)

    def sources(self) -> Mapping[str, Source]:
        """Return the documents of the files."""
        return {part: self.reader.source(paths, f"{part}_file") for part, paths in self.files.items()}
