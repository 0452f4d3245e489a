"""Reading sentences from CSV, TSV, JSON lines, Parquet and plain text, with errors that name file, line and column."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
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
        return [self._sentence(path, line, record) for line, record in self._records(Path(path), self._text_columns())]

    def examples(self, path: str | Path) -> RawExamples:
        """Read the sentences and labels of a file.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        if self._format(Path(path)) == "txt":
            raise DataError(
                f"{path}: plain text has no labels; use it in data.transfer, or give CSV, TSV, JSONL or Parquet"
            )
        texts, labels, places = [], [], []
        for line, record in self._records(Path(path), [*self._text_columns(), self.label_column]):
            place = self._place(path, line, self.label_column)
            texts.append(self._sentence(path, line, record))
            labels.append(label_of(record.get(self.label_column), place))
            places.append(line)
        return RawExamples(texts, labels, str(path), lambda i: self._place(path, places[i], self.label_column))

    def _text_columns(self) -> list[str]:
        return [self.text_column] + ([self.text_pair_column] if self.text_pair_column else [])

    def _sentence(self, path: str | Path, line: int, record: dict[str, Any]) -> Sentence:
        return tuple(text_of(record.get(name), self._place(path, line, name)) for name in self._text_columns())

    def _place(self, path: str | Path, line: int, column: str) -> str:
        unit = "row" if self._format(Path(path)) == "parquet" else "line"
        return f"{path}: {unit} {line}, column {column!r}"

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
        text = _decode(path, self.encoding)
        if kind == "txt":
            return _lines(text, self.text_column)
        if kind == "jsonl":
            return _json_records(path, text, columns)
        return _csv_records(path, text, columns, "\t" if kind == "tsv" else ",", self.quotes)


def _decode(path: Path, encoding: str) -> str:
    content = path.read_bytes()
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except LookupError as error:
        raise ConfigError(f"data.encoding={encoding!r} is not an encoding Python knows; e.g. utf-8, gb18030") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise DataError(f"{path}: line {line}: {bad} is not {encoding}; set data.encoding to the file's own") from error


def _lines(text: str, column: str) -> Iterator[Record]:
    # Not `str.splitlines`, which also breaks lines at form feeds and Unicode separators inside a sentence.
    for line, sentence in enumerate(io.StringIO(text, newline=None), start=1):
        if sentence.strip():
            yield line, {column: sentence}


def _check_columns(path: Path, header: Sequence[str], columns: Sequence[str], place: str = "") -> None:
    for name in columns:
        if name not in header:
            keys = "set data.text_column, data.text_pair_column or data.label_column"
            raise DataError(f"{path}: {place}no column {name!r}{did_you_mean(name, map(str, header))} ({keys})")
        if list(header).count(name) > 1:
            raise DataError(f"{path}: {place}there are several columns {name!r}; rename all but one")


def _csv_records(path: Path, text: str, columns: Sequence[str], delimiter: str, quotes: bool) -> Iterator[Record]:
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
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


def _json_records(path: Path, text: str, columns: Sequence[str]) -> Iterator[Record]:
    for line, content in enumerate(io.StringIO(text, newline=None), start=1):
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
