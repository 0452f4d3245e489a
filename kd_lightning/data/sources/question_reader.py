"""Questions of SQuAD's JSON, of JSONL, Parquet and data sets, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kd_lightning.data.sources.files import data_key
from kd_lightning.data.sources.records import (
    ZIPPED,
    Manner,
    check_file,
    format_of,
    lines_of,
    parsed,
    placed_rows,
    read_each,
    records_of,
)
from kd_lightning.data.text.questions import Answer, Question, checked
from kd_lightning.runtime.errors import DataError

QuestionFormat = Literal["squad", "jsonl", "parquet"]
ANSWERS = "an object with the lists text and answer_start, or a list of objects with a text and an answer_start"


@dataclass(frozen=True)
class QuestionReader:
    """How the user's files are written.

    Attributes:
        id_column: Of JSONL, Parquet and data sets the column with a question's id; None: questions are numbered.
        text_column: That with the question.
        text_pair_column: That with the context.
        answers_column: That with the answers.
        format: The files' format; by default from each file's suffix, and of .json from what the file begins with.
        encoding: Of the text formats.
    """

    id_column: str | None = "id"
    text_column: str = "question"
    text_pair_column: str = "context"
    answers_column: str = "answers"
    format: QuestionFormat | None = None
    encoding: str = "utf-8"

    def questions(self, path: str, known: bool = True) -> list[Question]:
        """Read the questions of a file.

        Args:
            path: The file.
            known: Whether to read their answers, too.

        Raises:
            DataError: Whatever is wrong with the file.
        """
        file = Path(path)
        check_file(file)
        kind = self._kind(file)
        if kind == "squad":
            found = list(self._squad(file, known))
        else:
            word, records = records_of(file, kind, self.columns(known), self._manner)
            found = read_each(f"{path}: {word}", records, partial(self.question, known=known))
        if not found:
            raise DataError(f"{path}: there are no questions")
        return found

    def split(self, splits: Mapping[str, Any], split: str, name: str) -> list[Question]:
        """Return the questions of a split of a data set.

        Raises:
            ConfigError: No such split.
            DataError: No such column, or what a record must not hold.
        """
        return read_each(*placed_rows(splits, split, name, self.columns(True), data_key), self.question)

    def columns(self, known: bool) -> dict[str, str]:
        """Return the columns that a record needs, by the options that name them."""
        names = {"id_column": self.id_column, "text_column": self.text_column}
        names |= {"text_pair_column": self.text_pair_column} | (
            {"answers_column": self.answers_column} if known else {}
        )
        return {option: name for option, name in names.items() if name is not None}

    def question(self, record: Mapping[str, Any], place: str, known: bool = True) -> Question:
        """Return the question of a record.

        Raises:
            DataError: It holds something else.
        """
        id_ = place if self.id_column is None else _id(record[self.id_column], f"{place}, column {self.id_column!r}")
        texts = [_text(record[name], f"{place}, column {name!r}") for name in (self.text_column, self.text_pair_column)]
        answers = _answers(record[self.answers_column], f"{place}, column {self.answers_column!r}") if known else None
        return checked(Question(id_, texts[0], texts[1], answers, place))

    def _squad(self, path: Path, known: bool) -> Iterator[Question]:
        """Yield the questions of a file in SQuAD's own format, versions 1.1 and 2.0."""
        content = parsed(path, "".join(lines_of(path, self._manner)), 1)
        for number, article in _numbered(content, "data", f"{path}", "article"):
            place = f"{path}: article {number}"
            for part, paragraph in _numbered(article, "paragraphs", place, "paragraph"):
                beside = f"{place}, paragraph {part}"
                context = _text(paragraph.get("context"), f"{beside}, context")
                for entry, one in _numbered(paragraph, "qas", beside, "question"):
                    where = f"{beside}, question {entry}"
                    none = one.get("is_impossible") is True
                    answers = _answers(one.get("answers", [] if none else None), f"{where}, answers") if known else None
                    if none and answers:
                        raise DataError(f"{where}: is_impossible is true, and there are answers: remove either")
                    text = _text(one.get("question"), f"{where}, question")
                    yield checked(Question(_id(one.get("id", where), f"{where}, id"), text, context, answers, where))

    @property
    def _manner(self) -> Manner:
        return Manner(self.encoding, True, data_key)

    def _kind(self, path: Path) -> QuestionFormat:
        name = path.with_suffix("") if path.suffix.lower() == ZIPPED else path
        if self.format is not None:
            return self.format
        if name.suffix.lower() == ".json":
            return "squad" if self._is_squad(path) else "jsonl"
        kind = format_of(path)
        if kind in ("jsonl", "parquet"):
            return kind
        raise DataError(
            f"{path}: cannot tell the format from {name.suffix!r}; set data.format to squad, jsonl or parquet"
        )

    def _is_squad(self, path: Path) -> bool:
        """Return whether a file is one object with `data`.

        Raises:
            DataError: It is neither JSON nor has it a value a line.
        """
        try:
            content = parsed(path, "".join(lines_of(path, self._manner)), 1)
        except DataError as error:
            first = next((line for line in lines_of(path, self._manner) if line.strip()), "")
            try:
                json.loads(first)
            except (ValueError, RecursionError):
                raise error from None
            return False  # an object a line
        return isinstance(content, dict) and "data" in content


def _numbered(holder: Any, key: str, place: str, word: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a list, from 1."""
    entries = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(entries, list):
        raise DataError(f"{place}: expected {key!r}, a list of objects, as SQuAD's format has it")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise DataError(f"{place}: {word} {number}: expected an object, got {str(entry)[:40]!r}")
        yield number, entry


def _id(value: object, where: str) -> str:
    if value is None:
        raise DataError(f"{where}: expected a text or a number, got null")
    return str(value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text, got {str(value)[:40]!r}")
    return value


def _answers(value: Any, where: str) -> tuple[Answer, ...]:
    """Return answers in either of their forms, without white space around them."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping) and all(isinstance(value.get(key), list) for key in ("text", "answer_start")):
        if len(value["text"]) != len(value["answer_start"]):
            raise DataError(
                f"{where}: {len(value['text'])} texts and {len(value['answer_start'])} numbers of answer_start; "
                "expected one for each"
            )
        pairs = list(zip(value["text"], value["answer_start"], strict=True))
    elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        pairs = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        raise DataError(f"{where}: expected {ANSWERS}, got {str(value)[:40]!r}")
    found = []
    for text, start in pairs:
        if not isinstance(text, str) or type(start) is not int:
            raise DataError(f"{where}: expected {ANSWERS}, got {text!r} and {start!r}")
        stripped = text.strip()
        found.append(Answer(stripped, start + len(text) - len(text.lstrip()) if stripped else start))
    return tuple(dict.fromkeys(found))
