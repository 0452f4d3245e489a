"""Tagged words of CoNLL columns, JSONL and Parquet files, with errors that name file and line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd_lightning.data.sources.files import FileReader, data_key
from kd_lightning.data.sources.records import Manner, Record, check_file, lines_of, read_each, records_of
from kd_lightning.data.text.tagged import Place, TaggedText, from_spans, from_words, split_words
from kd_lightning.runtime.errors import DataError
from kd_lightning.tasks.entities import Scheme

TaggedFormat = Literal["conll", "jsonl", "parquet"]
SUFFIXES: dict[str, TaggedFormat] = {
    **dict.fromkeys((".conll", ".bio", ".iob", ".bioes", ".tsv", ".tab", ".txt"), "conll"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
NEW_FILE = "-DOCSTART-"
"""The word on a line of a CoNLL file that is none of a text's."""


@dataclass(frozen=True)
class TaggedReader:
    """How the user's files are written.

    Attributes:
        tokens_column: Of JSONL and Parquet the column with the words.
        tags_column: That with their tags.
        text_column: Instead of words the column with a text; None where words are given.
        spans_column: That with its entities: objects with `start`, `end` (in characters) and `label`.
        scheme: In which spans become tags.
        names: What tags that are numbers stand for.
        format: The files' format; by default from each file's suffix.
        encoding: Of the text formats.
    """

    tokens_column: str = "tokens"
    tags_column: str = "tags"
    text_column: str | None = None
    spans_column: str = "spans"
    scheme: Scheme = "bio"
    names: Sequence[str] = ()
    format: TaggedFormat | None = None
    encoding: str = "utf-8"

    def tagged(self, path: str) -> list[TaggedText]:
        """Read the tagged texts of a file.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        if (kind := self._kind(Path(path))) == "conll":
            found = list(self._columns(Path(path)))
        else:
            word, records = records_of(Path(path), kind, self.columns, self._manner)
            found = self.texts(f"{path}: {word}", records)
        if not found:
            raise DataError(f"{path}: there are no texts")
        return found

    def untagged(self, path: str) -> list[TaggedText]:
        """Read untagged texts: one per line of a .txt file, or a file's texts without their tags.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        if Path(path).suffix.lower() != ".txt":
            return self.tagged(path)
        reader = FileReader(format="txt", encoding=self.encoding)
        return [TaggedText(text, split_words(text), None, Place(path, 0)) for (text,) in reader.sentences(path)]

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a record needs, by the options that name them."""
        if self.text_column is None:
            return {"tokens_column": self.tokens_column, "tags_column": self.tags_column}
        return {"text_column": self.text_column, "spans_column": self.spans_column}

    def texts(self, source: str, records: Iterable[Record]) -> list[TaggedText]:
        """Return the tagged texts of numbered records.

        Raises:
            DataError: Whatever is wrong with them.
        """
        numbered = ((number, (number, record)) for number, record in records)
        return read_each(source, numbered, lambda one, _: self.text(one[1], Place(source, one[0])))

    def text(self, record: Mapping[str, Any], place: Place) -> TaggedText:
        """Return the tagged text of a record.

        Raises:
            DataError: It holds something else.
        """
        if self.text_column is None:
            words, tags = (_list(record[name], name, place) for name in self.columns.values())
            if bad := [word for word in words if not isinstance(word, str)]:
                raise DataError(f"{place}, column {self.tokens_column!r}: expected words, got {bad[0]!r}")
            return from_words(words, [self._tag(tag, place.word(i)) for i, tag in enumerate(tags)], place)
        text = record[self.text_column]
        if not isinstance(text, str):
            raise DataError(f"{place}, column {self.text_column!r}: expected a text, got {text!r}")
        spans = [_span(span, place) for span in _list(record[self.spans_column], self.spans_column, place)]
        return from_spans(text, spans, place, self.scheme)

    def _tag(self, tag: object, where: str) -> str:
        """Return a tag that is written as one, or as its number."""
        if isinstance(tag, int) and 0 <= tag < len(self.names):
            return self.names[tag]
        if isinstance(tag, str):
            return tag
        expected = f"a number below {len(self.names)}" if self.names else "a name, or data.class_names for numbers"
        raise DataError(f"{where}: the tag {tag!r}: expected {expected}")

    def _columns(self, path: Path) -> Iterator[TaggedText]:
        """Yield the texts of a file with a word and its tags on each line, and a blank line between texts."""
        check_file(path)
        rows: list[list[str]] = []
        width, number = 0, 0
        for number, line in enumerate(lines_of(path, self._manner), start=1):
            cells = line.strip("\r\n").split("\t") if "\t" in line else line.split()
            if not line.strip() or cells[0] == NEW_FILE:
                if rows:
                    yield self._of_rows(rows, path, number)
                rows = []
                continue
            width = width or len(cells)
            if len(cells) < 2:
                raise DataError(f"{path}: line {number}: {line.strip()!r} is one column; expected a word and its tag")
            if len(cells) != width:
                raise DataError(f"{path}: line {number}: {len(cells)} columns, but the lines before have {width}")
            rows.append(cells)
        if rows:
            yield self._of_rows(rows, path, number + 1)

    def _of_rows(self, rows: list[list[str]], path: Path, end: int) -> TaggedText:
        place = Place(f"{path}: line", end - len(rows), columns=True)
        return from_words([cells[0] for cells in rows], [cells[-1].strip() for cells in rows], place)

    @property
    def _manner(self) -> Manner:
        return Manner(self.encoding, True, data_key)

    def _kind(self, path: Path) -> TaggedFormat:
        name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
        found = self.format or SUFFIXES.get(name.suffix.lower())
        if found is None:
            raise DataError(
                f"{path}: cannot tell the format from {name.suffix!r}; set data.format to conll, jsonl or parquet"
            )
        return found


def _list(value: object, column: str, place: Place) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{place}, column {column!r}: expected a list, got {value!r}")
    return value


def _span(value: object, place: Place) -> tuple[int, int, str]:
    """Return the first character, the one after the last, and the type of an entity."""
    if isinstance(value, dict):
        start, stop, kind = (value.get(name) for name in ("start", "end", "label"))
        if type(start) is int and type(stop) is int and isinstance(kind, str) and kind.strip():
            return start, stop, kind.strip()
    raise DataError(f"{place}: the span {value!r}: expected an object with start and end (numbers) and label (a name)")
