"""The user's own questions: files, or a data set of the Hugging Face hub."""

from __future__ import annotations

from typing import Any, get_args

from kd_lightning.data.sources.hf_dataset import load_splits, usual_splits
from kd_lightning.data.sources.question_reader import QuestionFormat, QuestionReader
from kd_lightning.data.text.question_data import QuestionData
from kd_lightning.data.text.questions import Question, QuestionCorpus, assemble_questions
from kd_lightning.runtime.errors import ConfigError, did_you_mean


class QuestionFiles(QuestionData):
    """Questions with contexts and answers in files, or in a data set that `datasets` can load.

    Files are SQuAD's own JSON (1.1 or 2.0), JSONL or Parquet, also compressed (.gz). A record has an id, a question, a
    context and its answers, each a text and the character where it begins. Where a validation or test file is not
    given, a part of the contexts is held out of the training questions.

    Args:
        train_file: The questions to train on.
        validation_file: Those to select on.
        test_file: Those to report on.
        name: Instead of files the name of a data set such as `squad`, or a folder written by `save_to_disk`: its splits
            `train`, `validation` (or `valid`, `val`, `dev`) and `test`.
        config_name: Which of the data set's configurations.
        id_column: The column with the id; None: questions are numbered.
        text_column: That with the question.
        text_pair_column: That with the context.
        answers_column: That with the answers.
        format: The files' format, `squad`, `jsonl` or `parquet`; by default as the file shows.
        encoding: Of the text formats.
        validation_fraction: How many of the contexts to hold out for a missing validation file.
        test_fraction: How many of the contexts to hold out for a missing test file.
        options: Those of `QuestionData`; `transfer` takes files, whose answers are not read.
    """

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        name: str | None = None,
        config_name: str | None = None,
        id_column: str | None = "id",
        text_column: str = "question",
        text_pair_column: str = "context",
        answers_column: str = "answers",
        format: QuestionFormat | None = None,
        encoding: str = "utf-8",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if (train_file is None) == (name is None):
            raise ConfigError("give data.train_file or data.name, one of the two")
        if format not in (None, *get_args(QuestionFormat)):
            raise ConfigError(f"data.format={format!r} is unknown{did_you_mean(str(format), get_args(QuestionFormat))}")
        self.files = {"train": train_file, "validation": validation_file, "test": test_file}
        self.dataset_name, self.config_name = name, config_name
        self.reader = QuestionReader(id_column, text_column, text_pair_column, answers_column, format, encoding)
        self.fractions = validation_fraction, test_fraction

    def read(self) -> QuestionCorpus:
        """Read the files or the data set, and hold out what is missing."""
        found = self._from_files() if self.dataset_name is None else self._from_dataset(self.dataset_name)
        train = found["train"]
        assert train is not None
        return assemble_questions(
            train, found["validation"], found["test"], fractions=self.fractions, split_seed=self.split_seed,
            transfer=[question for path in self.transfer for question in self.reader.questions(path, known=False)],
        )  # fmt: skip

    def _from_files(self) -> dict[str, list[Question] | None]:
        return {part: None if path is None else self.reader.questions(path) for part, path in self.files.items()}

    def _from_dataset(self, name: str) -> dict[str, list[Question] | None]:
        splits = load_splits(name, self.config_name)
        chosen = usual_splits(splits, name)
        return {
            part: self.reader.split(splits, chosen[part], name) if part in chosen else None
            for part in ("train", "validation", "test")
        }
