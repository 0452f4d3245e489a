"""Texts, pairs and triplets of tables, with errors that name file and line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.data.labels import decimal_of, folded
from kd_lightning.data.sources.files import FileReader, data_key
from kd_lightning.data.sources.records import Format, Placed, placed_rows, read_each, records_of
from kd_lightning.data.text.corpus import is_blank, text_of
from kd_lightning.data.text.groups import TextGroup
from kd_lightning.runtime.errors import ConfigError, DataError


def placed_records(path: str, columns: Mapping[str, str], reader: FileReader) -> Placed:
    """Return the records of a table.

    Raises:
        DataError: The file cannot be read.
    """
    word, records = records_of(Path(path), reader.kind(Path(path)), columns, reader.manner)
    return f"{path}: {word}", records


@dataclass(frozen=True)
class GroupReader:
    """Which columns hold the texts of a group.

    Attributes:
        text_column: The query, or the text that stands alone.
        positive_column: What belongs to it; None: texts are single.
        negative_column: What does not; None: none is given.
        score_column: How similar the two of a pair are; None: all pairs belong together.
        most_score: The score of pairs that mean the same; scores are divided by it.
        format: The files' format; by default from each file's suffix.
        encoding: Of the text formats.
        quotes: Whether `"` opens a quoted field in CSV and TSV.
        key: Turns these names into what the user can set.

    Raises:
        ConfigError: Columns that exclude each other, or one that is named twice.
    """

    text_column: str = "text"
    positive_column: str | None = None
    negative_column: str | None = None
    score_column: str | None = None
    most_score: float = 1.0
    format: Format | None = None
    encoding: str = "utf-8"
    quotes: bool = True
    key: Callable[[str], str] = data_key

    def __post_init__(self) -> None:
        named = ", ".join(f"{self.key(option)}={name}" for option, name in self.columns.items())
        if len(set(self.columns.values())) < len(self.columns):
            raise ConfigError(f"{named}: each must name a column of its own")
        if self.positive_column is None and (self.negative_column or self.score_column):
            raise ConfigError(f"{named}: a negative or a score is of a pair, name {self.key('positive_column')}")
        if self.negative_column and self.score_column:
            raise ConfigError(f"{named}: a triplet has no score, name one of the two")
        if not (self.most_score > 0 and math.isfinite(self.most_score)):
            raise ConfigError(f"{self.key('most_score')}={self.most_score:g}: expected a number above 0, such as 5")

    @property
    def text_columns(self) -> dict[str, str]:
        """The columns of the texts, by the options that name them."""
        options = ("text_column", "positive_column", "negative_column")
        return {option: name for option in options if (name := getattr(self, option)) is not None}

    @property
    def columns(self) -> dict[str, str]:
        """All columns, by the options that name them."""
        score = {} if self.score_column is None else {"score_column": self.score_column}
        return self.text_columns | score

    def groups(self, path: str) -> list[TextGroup]:
        """Read a file; a line of a .txt file is a text.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        kind = self._texts.kind(Path(path))
        if kind == "txt":
            found = [TextGroup((text,)) for (text,) in self._texts.sentences(path)]
        else:
            found = read_each(*placed_records(path, self.columns, self._texts), self._group)
        if not found:
            raise DataError(f"{path}: there are no texts")
        return found

    def texts(self, path: str) -> list[str]:
        """Read the single texts of a file, without what belongs to them.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        return [text for (text,) in self._texts.sentences(path)]

    def split(self, splits: Mapping[str, Any], split: str, name: str) -> list[TextGroup]:
        """Read a split of a data set.

        Raises:
            DataError: Whatever is wrong with it.
        """
        found = read_each(*placed_rows(splits, split, name, self.columns, self.key), self._group)
        if not found:
            raise DataError(f"{name}, split {split!r}: there are no texts")
        return found

    @property
    def _texts(self) -> FileReader:
        return FileReader(
            self.text_column, format=self.format, encoding=self.encoding, quotes=self.quotes, key=self.key
        )

    def _group(self, record: Mapping[str, Any], place: str) -> TextGroup:
        """Return the group of a record.

        Raises:
            DataError: It is none.
        """
        texts = []
        for option, name in self.text_columns.items():
            cell = record.get(name)
            if option == "negative_column" and isinstance(cell, list):
                texts += [text_of(one, f"{place}, column {name!r}") for one in cell]
            elif option != "positive_column" or not _is_gap(cell) or self.columns.keys() - {option, "text_column"}:
                texts.append(text_of(cell, f"{place}, column {name!r}"))
        if self.score_column is None:
            first, positive, *negatives = [*map(folded, texts), *[""] * (2 - len(texts))]
            if first == positive or positive in negatives:
                other = "the text itself" if first == positive else "a negative, too"
                raise DataError(f"{place}: the positive {texts[1]!r} is {other}; mend or remove the example")
            return TextGroup(tuple(texts))
        return TextGroup(tuple(texts), self._score(record.get(self.score_column), place))

    def _score(self, cell: object, place: str) -> float:
        where = f"{place}, column {self.score_column!r}"
        score = decimal_of(cell)
        if not 0 <= score <= self.most_score:
            raise DataError(
                f"{where}: the score {repr(cell)[:40]}: expected a number from 0 to {self.most_score:g} "
                f"({self.key('most_score')})"
            )
        return score / self.most_score


def _is_gap(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and is_blank(cell))
