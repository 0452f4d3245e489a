"""Documents of the user's own files: a text file is one, and so is each record of a table."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.data.corpus.store import Source
from kd_lightning.data.labels import check_unicode
from kd_lightning.data.sources.files import data_key
from kd_lightning.data.sources.records import (
    SUFFIXES,
    Format,
    Manner,
    check_columns,
    column_names,
    format_of,
    lines_of,
    records_of,
)
from kd_lightning.data.text.corpus import is_blank
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.seals import sha256


class FileDocuments(ABC):
    """Documents of files, folders, and data sets of the hub.

    Attributes:
        format: The files' format; by default from each file's suffix.
        encoding: Of the text formats.
    """

    format: Format | None
    encoding: str

    @property
    @abstractmethod
    def settings(self) -> list[Any]:
        """What decides the documents of a file."""

    @abstractmethod
    def documents(self, path: Path) -> Iterator[str]:
        """Yield the documents of a file as they are read.

        Raises:
            DataError: Names the file and the place in it.
        """

    @abstractmethod
    def columns(self, names: Callable[[], Sequence[str]]) -> dict[str, str]:
        """Return the columns to read, by the option that names each; `names` returns those there are."""

    @abstractmethod
    def document(self, record: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> str:
        """Return the document of a record."""

    @property
    def manner(self) -> Manner:
        """How the text formats are written."""
        return Manner(self.encoding, True, data_key)

    def source(self, paths: Sequence[str], option: str) -> Source:
        """Return the documents of files and folders, with all files of a known format below a folder.

        Args:
            paths: Files and folders.
            option: What gave them.

        Raises:
            DataError: There is no such file, or no file of a known format in a folder.
        """
        files = [file for path in paths for file in self._files(Path(path).expanduser(), option)]
        content = [[self.kind(file), sha256(file)] for file in files]
        key = digest([content, *self.settings])
        return Source(key, lambda: (text for file in files for text in self.documents(file)))

    def table(self, table: Any, name: str, split: str) -> Source:
        """Return the documents of a split of a data set that `datasets` has loaded.

        Raises:
            DataError: It has no such column.
        """
        where = f"{name}, split {split!r}"
        columns = self.columns(lambda: table.column_names)
        check_columns(table.column_names, columns, f"{where}: ", data_key)
        chosen = table.select_columns(list(columns.values()))

        def documents() -> Iterator[str]:
            return (self.document(record, f"{where}: row {row}", columns) for row, record in enumerate(chosen, start=1))

        content = hashlib.sha256()
        for record in chosen:
            content.update(json.dumps(record, default=str).encode() + b"\n")
        return Source(digest([content.hexdigest(), *self.settings]), documents)

    def records(self, path: Path, kind: Format) -> Iterator[str]:
        """Yield the documents of a file of records."""
        columns = self.columns(lambda: column_names(path, kind, self.manner))
        word, records = records_of(path, kind, columns, self.manner)
        return (self.document(record, f"{path}: {word} {number}", columns) for number, record in records)

    def kind(self, path: Path) -> Format:
        """Return a file's format.

        Raises:
            DataError: Its name does not say.
        """
        kind = self.format or format_of(path)
        if kind is None:
            known = ", ".join(SUFFIXES)
            raise DataError(f"{path}: cannot tell the format from {path.suffix!r}; set data.format, or name it {known}")
        return kind

    def _files(self, path: Path, option: str) -> list[Path]:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise DataError(f"{data_key(option)}: {path}: no such file or folder")
        found = sorted(file for file in path.rglob("*") if file.is_file() and (self.format or format_of(file)))
        if not found:
            raise DataError(f"{data_key(option)}: the folder {path} has no file of {', '.join(SUFFIXES)} in it")
        return found


@dataclass(frozen=True)
class DocumentReader(FileDocuments):
    """How the user's files are written.

    Attributes:
        text_column: The key (JSON) or column (Parquet, CSV, TSV) with the text; plain text files have none.
        format: The files' format; by default from each file's suffix.
        encoding: Of the text formats.
    """

    text_column: str = "text"
    format: Format | None = None
    encoding: str = "utf-8"

    @property
    def settings(self) -> list[Any]:
        """What decides the documents of a file."""
        return [self.text_column, self.encoding]

    def documents(self, path: Path) -> Iterator[str]:
        """Yield the documents of a file as they are read.

        Raises:
            DataError: Names the file and the place in it: no text, an empty one, or one in another encoding.
        """
        kind = self.kind(path)
        if kind == "txt":
            yield _checked("".join(lines_of(path, self.manner)), str(path))
        else:
            yield from self.records(path, kind)

    def columns(self, names: Callable[[], Sequence[str]]) -> dict[str, str]:
        """Return the column of the text."""
        return {"text_column": self.text_column}

    def document(self, record: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> str:
        """Return the text of a record."""
        return _checked(record[self.text_column], f"{where}, column {self.text_column!r}")


def _checked(text: object, where: str) -> str:
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: expected a text, got the {type(text).__name__} {text!r:.60}")
    if text is None or is_blank(text):
        raise DataError(f"{where}: the text is empty; fill it in or remove it")
    check_unicode(text, where)
    return text
