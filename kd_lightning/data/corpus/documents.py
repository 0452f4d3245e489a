"""Documents of the user's own files: a text file is one, and so is each record of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_lightning.data.corpus.store import Source
from kd_lightning.data.labels import check_unicode
from kd_lightning.data.sources.files import data_key
from kd_lightning.data.sources.records import SUFFIXES, Format, Manner, format_of, lines_of, records_of
from kd_lightning.data.text.corpus import is_blank
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.runtime.seals import sha256


@dataclass(frozen=True)
class DocumentReader:
    """How the user's files are written.

    Attributes:
        text_column: The key (JSON) or column (Parquet, CSV, TSV) with the text; plain text files have none.
        format: The files' format; by default from each file's suffix.
        encoding: Of the text formats.
    """

    text_column: str = "text"
    format: Format | None = None
    encoding: str = "utf-8"

    def source(self, paths: Sequence[str], option: str) -> Source:
        """Return the documents of files and folders, with all files of a known format below a folder.

        Args:
            paths: Files and folders.
            option: What gave them.

        Raises:
            DataError: There is no such file, or no file of a known format in a folder.
        """
        files = [file for path in paths for file in self._files(Path(path).expanduser(), option)]
        content = [[self._kind(file), sha256(file)] for file in files]
        key = digest([content, self.text_column, self.encoding])
        return Source(key, lambda: (text for file in files for text in self.documents(file)))

    def documents(self, path: Path) -> Iterator[str]:
        """Yield the documents of a file as they are read.

        Raises:
            DataError: Names the file and the place in it: no text, an empty one, or one in another encoding.
        """
        manner = Manner(self.encoding, True, data_key)
        kind = self._kind(path)
        if kind == "txt":
            yield _checked("".join(lines_of(path, manner)), str(path))
            return
        word, records = records_of(path, kind, {"text_column": self.text_column}, manner)
        for number, record in records:
            yield _checked(record[self.text_column], f"{path}: {word} {number}, column {self.text_column!r}")

    def _files(self, path: Path, option: str) -> list[Path]:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise DataError(f"{data_key(option)}: {path}: no such file or folder")
        found = sorted(file for file in path.rglob("*") if file.is_file() and (self.format or format_of(file)))
        if not found:
            raise DataError(f"{data_key(option)}: the folder {path} has no file of {', '.join(SUFFIXES)} in it")
        return found

    def _kind(self, path: Path) -> Format:
        kind = self.format or format_of(path)
        if kind is None:
            known = ", ".join(SUFFIXES)
            raise DataError(f"{path}: cannot tell the format from {path.suffix!r}; set data.format, or name it {known}")
        return kind


def _checked(text: object, where: str) -> str:
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: expected a text, got the {type(text).__name__} {text!r:.60}")
    if text is None or is_blank(text):
        raise DataError(f"{where}: the text is empty; fill it in or remove it")
    check_unicode(text, where)
    return text
