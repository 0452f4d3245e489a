"""Records of CSV, TSV, JSON, Parquet and text files, also gzipped; errors name file and line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from kd_lightning.runtime.errors import ConfigError, DataError, did_you_mean

T = TypeVar("T")
Read = TypeVar("Read")
Format = Literal["csv", "tsv", "jsonl", "parquet", "txt"]
Record = tuple[int, dict[str, Any]]
"""A record and the line where it begins (in a Parquet file its row, in a JSON array its place), counted from 1."""

Placed = tuple[str, Iterator[Record]]
"""Where records are, such as "my.csv: line", and each with its number there."""

SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "txt",
}
ZIPPED = ".gz"
DELIMITERS = ",;\t|"
"""Delimiters of CSV files; the first that yields the required columns is used."""

NAMED = 20
"""Faulty records that a message names."""

csv.field_size_limit(2**31 - 1)  # Python's default limit is 131,072 characters


@dataclass(frozen=True)
class Manner:
    """The format of a file, and the names of its options in messages.

    Attributes:
        encoding: Of the text formats.
        quotes: Whether `"` opens a quoted field in CSV and TSV.
        key: Turns an option such as `encoding` into the user's key: `data.encoding` or `--encoding`.
    """

    encoding: str
    quotes: bool
    key: Callable[[str], str]


def format_of(path: Path) -> Format | None:
    """Return the format by a file's name, ignoring `.gz`."""
    name = path.with_suffix("") if path.suffix.lower() == ZIPPED else path
    return SUFFIXES.get(name.suffix.lower())


def records_of(path: Path, kind: Format, columns: Mapping[str, str], manner: Manner) -> tuple[str, Iterator[Record]]:
    """Return the unit of a file's records (line, row or entry), and the records.

    Raises:
        DataError: The file cannot be read in this format.
        ConfigError: An unknown encoding.
    """
    check_file(path)
    if kind == "parquet":
        return "row", _parquet_records(path, columns, manner)
    lines = lines_of(path, manner, newline="" if kind in ("csv", "tsv") else None)
    if kind == "txt":
        return "line", ((line, {columns["text_column"]: text}) for line, text in enumerate(lines, start=1))
    first = list(_first_lines(lines))
    everything = chain(first, lines)
    if kind != "jsonl":
        delimiter = "\t" if kind == "tsv" else _delimiter(first[-1:], columns)
        return "line", _csv_records(path, everything, columns, manner, delimiter)
    if first and first[-1].lstrip().startswith("["):
        entries = enumerate(parsed(path, "".join(everything), 1), start=1)
        return "entry", _objects(path, "entry", entries, columns, manner)
    return "line", _objects(path, "line", _json_lines(path, everything), columns, manner)


def placed_rows(
    splits: Mapping[str, Any], split: str, name: str, columns: Mapping[str, str], key: Callable[[str], str]
) -> Placed:
    """Return the rows of a data set's split.

    Raises:
        ConfigError: No such split.
        DataError: A column is missing.
    """
    if split not in splits:
        raise ConfigError(f"data: {split!r} is no split of {name}{did_you_mean(split, splits)}")
    table, source = splits[split], f"{name}, split {split!r}"
    check_columns(table.column_names, columns, f"{source}: ", key)
    rows = zip(*(table[column] for column in columns.values()), strict=True)
    numbered = ((number, dict(zip(columns.values(), cells, strict=True))) for number, cells in enumerate(rows, start=1))
    return f"{source}: row", numbered


def read_each(place: str, records: Iterable[tuple[int, T]], read: Callable[[T, str], Read]) -> list[Read]:
    """Return what is read of each record; the error is of the first faulty one, and numbers the others.

    Args:
        place: Where records are, such as "my.csv: line".
        records: Each with its number there.
        read: Reads a record, given its place, such as "my.csv: line 7".

    Raises:
        DataError: What `read` raised first.
    """
    found, faulty, first = [], [], None
    for number, record in records:
        try:
            found.append(read(record, f"{place} {number}"))
        except DataError as error:
            first = first or error
            faulty.append(number)
    if first is None:
        return found
    others = faulty[1:]
    if not others:
        raise first
    listed = ", ".join(map(str, others[:NAMED])) + (", ..." if len(others) > NAMED else "")
    word = place.rpartition(" ")[2]
    words = "entries" if word == "entry" else f"{word}s"
    which = f"{word} {listed} is" if len(others) == 1 else f"{words} {listed} are"
    raise DataError(f"{first} ({which} faulty, too)") from first


def column_names(path: Path, kind: Format, manner: Manner) -> list[str]:
    """Return the columns of a table, or the keys of the first record; of an empty file none.

    Raises:
        DataError: The file cannot be read in this format.
    """
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        check_file(path)
        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
    _, records = records_of(path, kind, {}, manner)
    return list(next(records, (0, {}))[1])


def check_file(path: Path) -> None:
    """Refuse a path without a file; the message suggests the nearest name.

    Raises:
        DataError: There is none.
    """
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, beside) if beside else f" (nor is there a folder {path.parent})"
        raise DataError(f"{path}: no such file{near if '?' in near or not beside else ''}")


def lines_of(path: Path, manner: Manner, newline: str | None = None) -> Iterator[str]:
    """Yield a file's lines one by one, to save memory.

    Raises:
        DataError: It cannot be read, or is not in this encoding.
        ConfigError: There is no such encoding.
    """
    try:
        with _opened(path, manner.encoding, newline) as file:
            yield next(file, "").removeprefix("\ufeff")
            yield from file
    except LookupError as error:
        raise ConfigError(unknown_encoding(manner)) from error
    except UnicodeError as error:
        key = manner.key("encoding")
        raise DataError(f"{path}: {bad_byte(_content(path), manner.encoding)}; set {key} to the file's own") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def unknown_encoding(manner: Manner) -> str:
    """Return the message for an unknown encoding."""
    return f"{manner.key('encoding')}={manner.encoding!r} is not an encoding Python knows; e.g. utf-8, gb18030"


def decoded(content: bytes, manner: Manner, source: str) -> str:
    """Decode a text and normalise its line ends.

    Raises:
        DataError: It is not in this encoding.
        ConfigError: There is no such encoding.
    """
    try:
        text = content.decode(manner.encoding)
    except LookupError as error:
        raise ConfigError(unknown_encoding(manner)) from error
    except UnicodeError as error:
        key = manner.key("encoding")
        raise DataError(f"{source}: {bad_byte(content, manner.encoding)}; set {key} to its own") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _opened(path: Path, encoding: str, newline: str | None) -> IO[str]:
    if path.suffix.lower() == ZIPPED:
        return gzip.open(path, "rt", encoding=encoding, newline=newline)
    return path.open(encoding=encoding, newline=newline)


def _content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix.lower() == ZIPPED else path.read_bytes()


def bad_byte(content: bytes, encoding: str) -> str:
    """Return which byte of a text is not in its encoding."""
    try:
        content.decode(encoding)
    except UnicodeError as error:
        if isinstance(error, UnicodeDecodeError):
            line = content.count(b"\n", 0, error.start) + 1
            return f"line {line}: byte 0x{content[error.start]:02x} at offset {error.start} is not {encoding}"
    return f"there is no byte order mark, which {encoding} needs"  # decodes as a whole, but not as a stream


def check_columns(header: Sequence[str], columns: Mapping[str, str], place: str, key: Callable[[str], str]) -> None:
    """Refuse a table without one of the columns, or with two of that name.

    Args:
        header: The columns there are.
        columns: The required columns by option.
        place: The place of the header, with a colon.
        key: Turns the option into the user's key.

    Raises:
        DataError: Names all columns there are.
    """
    there = [str(name) for name in header]
    for option, name in columns.items():
        if name not in there:
            near = did_you_mean(name, there)
            listed = f"; it has {', '.join(there)}" if "?" in near else ""
            raise DataError(f"{place}no column {name!r}{near}{listed} (set {key(option)})")
        if there.count(name) > 1:
            raise DataError(f"{place}there are several columns {name!r}; rename all but one")


def _csv_records(
    path: Path, lines: Iterable[str], columns: Mapping[str, str], manner: Manner, delimiter: str
) -> Iterator[Record]:
    quoting: Any = csv.QUOTE_MINIMAL if manner.quotes else csv.QUOTE_NONE
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
                check_columns(header, columns, f"{path}: line {line}: ", manner.key)
            elif len(cells) != len(header):
                hint = "quote a text that holds the delimiter" if len(cells) > len(header) else "a cell is missing"
                raise DataError(f"{path}: line {line}: {len(cells)} cells, but the header has {len(header)}; {hint}")
            else:
                yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        hint = f'double a quote inside a quoted text (""), or set {manner.key("quotes")}=false'
        raise DataError(f"{path}: the record from line {begin} on: {error}; {hint}") from error
    if header is None:
        raise DataError(f"{path}: the file is empty")


def _first_lines(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines up to the first that is not blank."""
    for line in lines:
        yield line
        if line.strip():
            return


def _delimiter(header: Sequence[str], columns: Mapping[str, str]) -> str:
    """Return the delimiter of a header: one that yields the columns, else the one with most cells."""
    cells = {mark: [cell.strip() for cell in next(csv.reader(header, delimiter=mark), [])] for mark in DELIMITERS}
    fits = (mark for mark in DELIMITERS if set(columns.values()) <= set(cells[mark]))
    return next(fits, max(DELIMITERS, key=lambda mark: len(cells[mark])))


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(lines, start=1):
        if content.strip():
            yield line, parsed(path, content.rstrip(), line)


def parsed(path: Path, content: str, line: int) -> Any:
    """Return the value of a JSON text that begins on a line of a file.

    Raises:
        DataError: It is none.
    """
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"{path}: line {line + error.lineno - 1}, character {error.colno}"
        raise DataError(
            f"{place}: not JSON: {error.msg}; expected an object a line, or one array of objects"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting of thousands of levels
        raise DataError(f"{path}: line {line}: not JSON that can be read: {error}") from error


def _objects(
    path: Path, word: str, found: Iterable[tuple[int, Any]], columns: Mapping[str, str], manner: Manner
) -> Iterator[Record]:
    for number, record in found:
        if not isinstance(record, dict):
            shown, column = json.dumps(record, ensure_ascii=False)[:40], next(iter(columns.values()), "name")
            raise DataError(f"{path}: {word} {number}: expected an object like {{{column!r}: ...}}, got {shown}")
        check_columns(list(record), columns, f"{path}: {word} {number}: ", manner.key)
        yield number, record


def _parquet_records(path: Path, columns: Mapping[str, str], manner: Manner) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_columns(file.schema_arrow.names, columns, f"{path}: ", manner.key)
            batches = file.iter_batches(columns=list(dict.fromkeys(columns.values())))
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
