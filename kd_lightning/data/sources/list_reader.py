"""Queries with documents of tables, with errors that name file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_lightning.data.labels import decimal_of, folded
from kd_lightning.data.sources.files import FileReader, data_key
from kd_lightning.data.sources.group_reader import placed_records
from kd_lightning.data.sources.records import Format, Placed, placed_rows, read_each
from kd_lightning.data.text.corpus import text_of
from kd_lightning.data.text.lists import RankedList
from kd_lightning.runtime.errors import ConfigError, DataError

LEAST, MOST = 1e-6, 1e6
"""Grades of relevant documents: what float32 tells from 0, and sums without overflow."""


@dataclass
class _Query:
    """A query while its records are read.

    Attributes:
        place: Its first record's.
        text: As it stands there.
        documents: Each document with its grade, in their order.
        seen: The documents, in their normal form, with their places and grades.
    """

    place: str
    text: str
    documents: list[tuple[str, float]] = field(default_factory=list)
    seen: dict[str, tuple[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ListReader:
    """Which columns hold queries, documents and grades.

    A cell of documents or grades may be a list in JSONL and Parquet. Records with the same query are one, wherever they
    are. Documents keep the order of the records. In rows of a query, a positive and a negative, as triplets are
    exported, the same positives and negatives come again, and count once.

    Attributes:
        query_column: The query.
        document_column: A document, or several, with their grades.
        grade_column: How relevant each is: 0 for not at all.
        positive_column: Instead of these documents of grade 1.
        negative_column: Documents of grade 0 for the same query; None: none is given.
        format: The files' format; by default from each file's suffix.
        encoding: Of the text formats.
        quotes: Whether `"` opens a quoted field in CSV and TSV.
        key: Turns these names into what the user can set.

    Raises:
        ConfigError: Columns that are missing, exclude each other, or one that is named twice.
    """

    query_column: str = "query"
    document_column: str | None = None
    grade_column: str | None = None
    positive_column: str | None = None
    negative_column: str | None = None
    format: Format | None = None
    encoding: str = "utf-8"
    quotes: bool = True
    key: Callable[[str], str] = data_key

    def __post_init__(self) -> None:
        named = ", ".join(f"{self.key(option)}={name}" for option, name in self.columns.items())
        graded = self.document_column is not None, self.grade_column is not None
        if graded[0] != graded[1] or graded[0] == (self.positive_column is not None):
            raise ConfigError(
                f"{named}: name {self.key('document_column')} and {self.key('grade_column')}, or "
                f"{self.key('positive_column')}, one of the two ways"
            )
        if graded[0] and self.negative_column is not None:
            raise ConfigError(f"{named}: documents with grades have no column of negatives, give these grade 0")
        if len(set(self.columns.values())) < len(self.columns):
            raise ConfigError(f"{named}: each must name a column of its own")

    @property
    def columns(self) -> dict[str, str]:
        """All columns, by the options that name them."""
        options = ("query_column", "document_column", "grade_column", "positive_column", "negative_column")
        return {option: name for option in options if (name := getattr(self, option)) is not None}

    def lists(self, path: str, judged: bool) -> list[RankedList]:
        """Read a file.

        Args:
            path: The file.
            judged: Whether each query needs a relevant document, as scores do.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        reader = FileReader(format=self.format, encoding=self.encoding, quotes=self.quotes, key=self.key)
        if reader.kind(Path(path)) == "txt":
            raise DataError(f"{path}: plain text has no documents for a query; give CSV, TSV, JSONL or Parquet")
        return self._read(placed_records(path, self.columns, reader), judged, path)

    def split(self, splits: Mapping[str, Any], split: str, name: str, judged: bool) -> list[RankedList]:
        """Read a split of a data set; arguments as for `lists`.

        Raises:
            DataError: Whatever is wrong with it.
        """
        return self._read(placed_rows(splits, split, name, self.columns, self.key), judged, f"{name}, split {split!r}")

    def _read(self, placed: Placed, judged: bool, source: str) -> list[RankedList]:
        found: dict[str, _Query] = {}

        def read(record: Mapping[str, Any], place: str) -> None:
            text = text_of(record.get(self.query_column), f"{place}, column {self.query_column!r}")
            query = found.setdefault(folded(text), _Query(place, text))
            for document, grade in self._documents(record, place):
                before, known = query.seen.setdefault(folded(document), (place, grade))
                if len(query.seen) > len(query.documents):
                    query.documents.append((document, grade))
                elif self.positive_column is None or known != grade:
                    twice = "twice" if before == place else f"as in {before.removeprefix(f'{source}: ')}"
                    raise DataError(f"{place}: the query {text[:80]!r} has the document {document[:80]!r} {twice}")

        read_each(*placed, read)
        for query in found.values():
            if not query.documents:
                raise DataError(f"{query.place}: the query {query.text[:80]!r} has no documents")
            if judged and not any(grade > 0 for _, grade in query.documents):
                raise DataError(
                    f"{query.place}: the query {query.text[:80]!r} has no relevant document, so nothing can be scored; "
                    "mend or remove it"
                )
        if not found:
            raise DataError(f"{source}: there are no queries")
        return [
            RankedList(query.text, *(tuple(part) for part in zip(*query.documents, strict=True)))  # type: ignore[arg-type]
            for query in found.values()
        ]

    def _documents(self, record: Mapping[str, Any], place: str) -> Iterator[tuple[str, float]]:
        """Yield the documents of a record with their grades."""
        if self.document_column is None or self.grade_column is None:
            for option, grade in (("positive_column", 1.0), ("negative_column", 0.0)):
                for document, _ in _cells(record, self.columns.get(option), place):
                    yield document, grade
            return
        documents = list(_cells(record, self.document_column, place))
        cell = record.get(self.grade_column)
        grades = cell if isinstance(cell, list) else [cell]
        if len(grades) != len(documents):
            raise DataError(f"{place}: {len(documents)} documents and {len(grades)} grades: expected a grade for each")
        for (document, which), grade in zip(documents, grades, strict=True):
            yield document, self._grade(grade, f"{place}, column {self.grade_column!r}{which}")

    def _grade(self, cell: object, where: str) -> float:
        grade = decimal_of(cell)
        if grade != 0 and not LEAST <= grade <= MOST:
            raise DataError(
                f"{where}: the grade {repr(cell)[:40]}: expected a number, 0 for an irrelevant document, else "
                f"{LEAST:g} to {MOST:g}"
            )
        return grade


def _cells(record: Mapping[str, Any], column: str | None, place: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of a cell, one or a list, with which of a list it is; none without a column."""
    if column is None:
        return
    cell, where = record.get(column), f"{place}, column {column!r}"
    if not isinstance(cell, list):
        yield text_of(cell, where), ""
        return
    for number, one in enumerate(cell, start=1):
        yield text_of(one, f"{where}, text {number}"), f", text {number}"
