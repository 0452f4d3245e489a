"""The user's own files."""

from __future__ import annotations

from typing import Any

from kd_lightning.data.labels import ClassNames
from kd_lightning.data.sources.files import FileReader
from kd_lightning.data.sources.hf_dataset import unlabelled
from kd_lightning.data.sources.records import Format
from kd_lightning.data.text.corpus import Corpus, assemble
from kd_lightning.data.text.datamodule import TextData


class TextFiles(TextData):
    """Sentences or pairs in CSV, TSV, JSON or Parquet files; for `transfer` also text files.

    Files may be compressed (.csv.gz); a CSV file's cells may be separated by commas, semicolons, tabs or bars; JSON is
    an object a line or one array of objects. Labels may be names or whole numbers, which are the same class however a
    file writes them (1, 1.0, 01). -100 marks an unlabelled training sentence; an empty label or NaN is refused, and so
    is -1 unless `class_names` has it. Without a validation or test file, a stratified share of the training file is
    held out, after dropping exact duplicates.

    Args:
        train_file: The labelled training sentences.
        validation_file: Those for selection.
        test_file: Those for the report.
        text_column: The column with the sentence.
        text_pair_column: The column with the second sentence of a pair.
        label_column: The column with the class.
        class_names: The classes in the order of their numbers, by which files may then name them; by default the labels
            found, sorted.
        format: The files' format; by default from the suffix.
        encoding: Of the text formats.
        quotes: Whether `"` opens a quoted field in CSV and TSV (the TSV files of GLUE have none).
        validation_fraction: Share to hold out for a missing validation file.
        test_fraction: Share to hold out for a missing test file.
        options: Those of `TextData`.
    """

    def __init__(
        self,
        train_file: str,
        validation_file: str | None = None,
        test_file: str | None = None,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        class_names: ClassNames | None = None,
        format: Format | None = None,
        encoding: str = "utf-8",
        quotes: bool = True,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.train_file = train_file
        self.validation_file = validation_file
        self.test_file = test_file
        self.given_class_names = class_names
        self.reader = FileReader(text_column, text_pair_column, label_column, format, encoding, quotes)
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction

    def read(self) -> Corpus:
        """Read the files and hold out what is missing."""
        return assemble(
            self.reader.examples(self.train_file),
            self.reader.examples(self.validation_file) if self.validation_file else None,
            self.reader.examples(self.test_file) if self.test_file else None,
            class_names=self.given_class_names,
            validation_fraction=self.validation_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            transfer=[text for name in self.transfer for text in unlabelled(name, self.reader)],
        )
