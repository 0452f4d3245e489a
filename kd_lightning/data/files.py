"""Reading sentences from CSV, TSV, JSON lines, Parquet and plain text, with errors that name file, line and column."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd_lightning.data.corpus import RawExamples, Sentence, label_of, text_of
from kd_lightning.errors import ConfigError, DataError, did_you_mean

Format = Literal["csv", "tsv", "jsonl", "parquet", "txt"]
Record = tuple[int, dict[str, Any]]
"""A record and the line (in a Parquet file: the row) where it begins, counted from 1."""

SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "txt",
}


@dataclass(frozen=True)
class FileReader:
    """How the user's files are written: one reader serves all files of a data set.

    Attributes:
        text_column: The column with the sentence.
        text_pair_column: The column with the second sentence of a pair.
        label_column: The column with the class.
        format: The files' format; by default told from each file's suffix.
        encoding: Of the text formats; a byte order mark is skipped.
        quotes: Whether `"` opens a quoted field in CSV and TSV.
    """

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    format: Format | None = None
    encoding: str = "utf-8"
    quotes: bool = True

    def sentences(self, path: str | Path) -> list[Sentence]:
        """Read the sentences of a file and ignore its labels, if it has any.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        place = self._place(path)
        records = self._records(Path(path), self.text_columns)
        return [self._sentence(record, f"{place} {line}") for line, record in records]

    def examples(self, path: str | Path) -> RawExamples:
        """Read the sentences and labels of a file.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        if self._format(Path(path)) == "txt":
            raise DataError(
                f"{path}: plain text has no labels; use it in data.transfer, or give CSV, TSV, JSONL or Parquet"
            )
        texts, labels, lines = [], [], []
        place, column = self._place(path), f", column {self.label_column!r}"
        for line, record in self._records(Path(path), [*self.text_columns, self.label_column]):
            texts.append(self._sentence(record, f"{place} {line}"))
            labels.append(sys.intern(label_of(record.get(self.label_column), f"{place} {line}{column}")))
            lines.append(line)
        return RawExamples(texts, labels, str(path), lambda i: f"{place} {lines[i]}{column}")

    @property
    def text_columns(self) -> list[str]:
        """The one column of the sentences, or the two of the pairs."""
        return [self.text_column] + ([self.text_pair_column] if self.text_pair_column else [])

    def _sentence(self, record: dict[str, Any], place: str) -> Sentence:
        return tuple([text_of(record.get(name), f"{place}, column {name!r}") for name in self.text_columns])

    def _place(self, path: str | Path) -> str:
        return f"{path}: {'row' if self._format(Path(path)) == 'parquet' else 'line'}"

    def _format(self, path: Path) -> Format:
        found = self.format or SUFFIXES.get(path.suffix.lower())
        if found is None:
            raise DataError(f"{path}: cannot tell the format from {path.suffix!r}; name the file {', '.join(SUFFIXES)}")
        return found

    def _records(self, path: Path, columns: Sequence[str]) -> Iterator[Record]:
        if not path.is_file():
            beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            near = did_you_mean(path.name, beside) if beside else f" (nor is there a folder {path.parent})"
            raise DataError(f"{path}: no such file{near if '?' in near or not beside else ''}")
        kind = self._format(path)
        if kind == "parquet":
            return _parquet_records(path, columns)
        if kind == "txt" and len(columns) > 1:
            raise DataError(f"{path}: plain text holds one sentence a line, and this task has pairs; give CSV or JSONL")
        lines = _lines(path, self.encoding, newline="" if kind in ("csv", "tsv") else None)
        if kind == "txt":
            return _plain_records(lines, self.text_column)
        if kind == "jsonl":
            return _json_records(path, lines, columns)
        return _csv_records(path, lines, columns, "\t" if kind == "tsv" else ",", self.quotes)


def _lines(path: Path, encoding: str, newline: str | None) -> Iterator[str]:
    """Yield a file's lines as they are read, so that only the sentences are ever in memory."""
    try:
        with path.open(encoding=encoding, newline=newline) as file:
            yield next(file, "").removeprefix("\ufeff")
            yield from file
    except LookupError as error:
        raise ConfigError(f"data.encoding={encoding!r} is not an encoding Python knows; e.g. utf-8, gb18030") from error
    except UnicodeError as error:
        raise DataError(f"{path}: {_bad_byte(path, encoding)}; set data.encoding to the file's own") from error


def _bad_byte(path: Path, encoding: str) -> str:
    content = path.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"line {line}: byte 0x{content[error.start]:02x} at offset {error.start} is not {encoding}"
    return f"there is no byte order mark, which {encoding} needs"


def _plain_records(lines: Iterable[str], column: str) -> Iterator[Record]:
    for line, sentence in enumerate(lines, start=1):
        if sentence.strip():
            yield line, {column: sentence}


def _check_columns(path: Path, header: Sequence[str], columns: Sequence[str], place: str = "") -> None:
    for name in columns:
        if name not in header:
            keys = "set data.text_column, data.text_pair_column or data.label_column"
            raise DataError(f"{path}: {place}no column {name!r}{did_you_mean(name, map(str, header))} ({keys})")
        if list(header).count(name) > 1:
            raise DataError(f"{path}: {place}there are several columns {name!r}; rename all but one")


def _csv_records(
    path: Path, lines: Iterable[str], columns: Sequence[str], delimiter: str, quotes: bool
) -> Iterator[Record]:
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for cells in rows:
            line, begin = begin, rows.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_columns(path, header, columns, f"line {line}: ")
            elif len(cells) != len(header):
                hint = "quote a text that holds the delimiter" if len(cells) > len(header) else "a cell is missing"
                raise DataError(f"{path}: line {line}: {len(cells)} cells, but the header has {len(header)}; {hint}")
            else:
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        hint = 'double a quote inside a quoted text (""), or set data.quotes=false'
        raise DataError(f"{path}: the record from line {begin} on: {error}; {hint}") from error
    if header is None:
        raise DataError(f"{path}: the file is empty")


def _json_records(path: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[Record]:
    for line, content in enumerate(lines, start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content.rstrip())
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {line}, character {error.colno}: not JSON: {error.msg}") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}: line {line}: expected an object like {{{columns[0]!r}: ...}}, got {content.strip()[:40]}"
            )
        _check_columns(path, list(record), columns, f"line {line}: ")
        yield line, record


def _parquet_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        _check_columns(path, pyarrow.parquet.read_schema(path).names, columns)
        table = pyarrow.parquet.read_table(path, columns=list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
    yield from enumerate(table.to_pylist(), start=1)
