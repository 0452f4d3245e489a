"""Sentences and labels from CSV, TSV, JSON, Parquet and text files; errors name file, line, column."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.data.labels import label_of
from kd_lightning.data.sources.records import SUFFIXES, Format, Manner, Record, format_of, read_each, records_of
from kd_lightning.data.text.corpus import RawExamples, Sentence, is_blank, text_of
from kd_lightning.runtime.errors import ConfigError, DataError


def data_key(option: str) -> str:
    """Return a data option's key in a run's configuration."""
    return f"data.{option}"


@dataclass(frozen=True)
class FileReader:
    """The format of the user's files, the same for all files of a data set.

    Attributes:
        text_column: The column with the sentence.
        text_pair_column: The column with the second sentence of a pair.
        label_column: The column with the class.
        format: The files' format; by default from each file's suffix.
        encoding: Of the text formats; a byte order mark is skipped.
        quotes: Whether `"` opens a quoted field in CSV and TSV.
        key: Turns these names into what the user can set.
    """

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    format: Format | None = None
    encoding: str = "utf-8"
    quotes: bool = True
    key: Callable[[str], str] = data_key

    def sentences(self, path: str | Path) -> list[Sentence]:
        """Read the sentences of a file, without labels and without blank lines of plain text.

        Raises:
            DataError: The file cannot be used.
        """
        plain = self.kind(Path(path)) == "txt"
        place, records = self._records(path)
        kept = (one for one in records if not (plain and is_blank(one[1][self.text_column])))
        return read_each(place, kept, self._sentence)

    def sentences_and_gaps(self, path: str | Path) -> list[Sentence | None]:
        """Read one sentence per record, None for records without text; of a list of second texts a pair each.

        Raises:
            DataError: The file cannot be used.
        """

        def read(record: dict[str, Any], where: str) -> Sentence | None:
            is_empty = all(_is_gap(record.get(name)) for name in self.text_columns.values())
            return None if is_empty else self._sentence(record, where)

        place, records = self._records(path)
        return read_each(place, ((number, one) for number, whole in records for one in self._spread(whole)), read)

    def examples(self, path: str | Path) -> RawExamples:
        """Read the sentences and labels of a file.

        Raises:
            DataError: The file cannot be used.
        """
        if self.kind(Path(path)) == "txt":
            raise DataError(
                f"{path}: plain text has no labels; use it in data.transfer, or give CSV, TSV, JSONL or Parquet"
            )
        numbers: list[int] = []
        column = f", column {self.label_column!r}"

        def read(record: Record, where: str) -> tuple[Sentence, str]:
            numbers.append(record[0])
            text = self._sentence(record[1], where)
            return text, sys.intern(label_of(record[1].get(self.label_column), where + column))

        place, records = self._records(path, labelled=True)
        found = read_each(place, ((one[0], one) for one in records), read)
        texts, labels = [text for text, _ in found], [label for _, label in found]
        return RawExamples(texts, labels, str(path), lambda i: f"{place} {numbers[i]}{column}")

    @property
    def text_columns(self) -> dict[str, str]:
        """The column of the sentences, or the two of the pairs, by the option that names it."""
        pair = {"text_pair_column": self.text_pair_column} if self.text_pair_column else {}
        return {"text_column": self.text_column} | pair

    @property
    def columns(self) -> dict[str, str]:
        """The columns of sentences and labels.

        Raises:
            ConfigError: Two of them are the same column.
        """
        columns = self.text_columns | {"label_column": self.label_column}
        if len(set(columns.values())) < len(columns):
            named = ", ".join(f"{self.key(option)}={name}" for option, name in columns.items())
            raise ConfigError(f"{named}: each must name a column of its own")
        return columns

    @property
    def manner(self) -> Manner:
        """How the text formats are written."""
        return Manner(self.encoding, self.quotes, self.key)

    def kind(self, path: Path) -> Format:
        """Return a file's format.

        Raises:
            DataError: The format is unknown.
        """
        if path.is_dir():
            raise DataError(f"{str(path)!r} is a folder: expected a file")
        found = self.format or format_of(path)
        if found is None:
            raise DataError(
                f"{path}: cannot tell the format from {path.suffix!r}; set {self.key('format')}, or name the file "
                f"{', '.join(SUFFIXES)} (each of them also .gz)"
            )
        return found

    def _spread(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a record for each of its second texts, where they are a list; one without any if it is empty."""
        name = self.text_pair_column
        cell = record.get(name) if name is not None else None
        return [{**record, name: one} for one in cell or [None]] if name and isinstance(cell, list) else [record]

    def _sentence(self, record: dict[str, Any], place: str) -> Sentence:
        return tuple([text_of(record.get(name), f"{place}, column {name!r}") for name in self.text_columns.values()])

    def _records(self, path: str | Path, labelled: bool = False) -> tuple[str, Iterator[Record]]:
        """Return the place of records without their numbers, and the records."""
        kind, columns = self.kind(Path(path)), self.columns if labelled else self.text_columns
        if kind == "txt" and len(columns) > 1:
            raise DataError(f"{path}: plain text holds one sentence a line, and this task has pairs; give CSV or JSONL")
        word, records = records_of(Path(path), kind, columns, self.manner)
        return f"{path}: {word}", records


def _is_gap(value: object) -> bool:
    return value is None or (isinstance(value, str) and is_blank(value))
