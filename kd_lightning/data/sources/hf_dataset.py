"""Data sets of the Hugging Face hub, or folders written by `Dataset.save_to_disk`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kd_lightning.data.labels import ClassNames, given_names, is_missing, label_of
from kd_lightning.data.sources.files import FileReader, data_key
from kd_lightning.data.sources.records import check_columns, read_each
from kd_lightning.data.text.corpus import Corpus, RawExamples, Sentence, assemble, text_of
from kd_lightning.data.text.datamodule import TextData
from kd_lightning.runtime.errors import ConfigError, DataError, did_you_mean

GLUE: dict[str, tuple[str, str | None]] = {
    "sst2": ("sentence", None),
    "cola": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""The text columns of GLUE's classification tasks."""

VALIDATION = ("validation", "validation_matched", "valid", "val", "dev")
"""Names of validation splits."""

Rows = TypeVar("Rows")

PREFIX = "hf:"
"""Prefix of data sets in `data.transfer`."""


class HFDataset(TextData):
    """Any text classification data set that `datasets` can load.

    Columns of the GLUE tasks are known by `config_name`. If the test split has no labels (GLUE's are all
    -1), the validation split becomes the test split, and a seeded, stratified share of the training split becomes the
    validation split, so that selection and report use different examples.

    Args:
        name: The data set's name on the hub, or a folder written by `save_to_disk`.
        config_name: Which of its configurations, such as a GLUE task.
        train_split: The training split.
        validation_split: The validation split; by default as described.
        test_split: The test split; by default as described.
        text_column: The column with the sentence; by default GLUE's, else `text`.
        text_pair_column: The column with the second sentence of a pair; by default GLUE's.
        label_column: The column with the class.
        class_names: The classes in the order of their numbers; by default those stored with the data.
        validation_fraction: Share to hold out without a validation split.
        test_fraction: Share to hold out without a labelled test split.
        options: Those of `TextData`; `transfer` takes files and data sets with the same columns.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str = "label",
        class_names: ClassNames | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if config_name == "stsb":
            raise ConfigError("data.config_name=stsb scores pairs from 0 to 5 (regression); choose a task with classes")
        columns = GLUE.get(config_name or "", ("text", None))
        self.dataset_name = name
        self.config_name = config_name
        self.train_split = train_split
        self.validation_split = validation_split
        self.test_split = test_split
        pair = text_pair_column or (None if text_column else columns[1])
        self.reader = FileReader(text_column or columns[0], pair, label_column)
        self.given_class_names = class_names
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction

    def read(self) -> Corpus:
        """Load the data set and assign its splits."""
        splits = load_splits(self.dataset_name, self.config_name)
        for key in ("train_split", "validation_split", "test_split"):
            chosen = getattr(self, key)
            if chosen is not None and chosen not in splits:
                raise ConfigError(
                    f"data.{key}={chosen!r} is not a split of {self.dataset_name}{did_you_mean(chosen, splits)}"
                )
        validation, test = self._roles(splits)
        names = self.given_class_names or _stored_names(splits[self.train_split], self.reader.label_column)
        return assemble(
            self._examples(splits, self.train_split),
            self._examples(splits, validation) if validation else None,
            self._examples(splits, test) if test else None,
            class_names=names,
            validation_fraction=self.validation_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            transfer=[text for name in self.transfer for text in unlabelled(name, self.reader)],
        )

    def _roles(self, splits: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Return the validation and test splits; None for one to hold out of training."""
        matched = (name for name in VALIDATION if name in splits)
        validation = self.validation_split or next(matched, None)
        test = self.test_split
        if test is None and "test" in splits and _is_labelled(splits["test"], self.reader.label_column):
            test = "test"
        if test is None and self.validation_split is None:
            return None, validation
        return (None if validation == test else validation), test

    def _names_of(self, table: Any) -> list[str] | None:
        """Return the names of a split's numeric labels: the given ones, or those stored with it.

        Raises:
            ConfigError: The number of given names differs from the stored ones.
        """
        stored = _stored_names(table, self.reader.label_column)
        if stored is None or self.given_class_names is None:
            return stored
        given = given_names(self.given_class_names)
        if len(given) != len(stored):
            raise ConfigError(
                f"data.class_names={given}: {self.dataset_name} has {len(stored)} classes, {', '.join(stored)}"
            )
        return stored if set(given) == set(stored) else given

    def _examples(self, splits: Mapping[str, Any], split: str) -> RawExamples:
        table = splits[split]
        source = f"{self.dataset_name}, split {split!r}"
        check_columns(table.column_names, self.reader.columns, f"{source}: ", data_key)

        names, column = self._names_of(table) or [], f", column {self.reader.label_column!r}"

        def read(cell: Any, where: str) -> str:
            return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else label_of(cell, where + column)

        labels = read_each(f"{source}: row", enumerate(table[self.reader.label_column], start=1), read)
        texts = _sentences(table, self.reader.text_columns, source)
        return RawExamples(texts, labels, source, lambda i: f"{source}: row {i + 1}{column}")


def unlabelled(name: str, reader: FileReader) -> list[Sentence]:
    """Return the sentences of a file, or of all splits of a data set `hf:NAME[:CONFIG]`.

    Raises:
        DataError: The file or the data set cannot be read, or has no such columns.
        ConfigError: A data set, and `datasets` is not installed.
    """
    if not name.startswith(PREFIX):
        return reader.sentences(name)
    dataset, _, config_name = name.removeprefix(PREFIX).partition(":")
    columns = reader.text_columns
    found: list[Sentence] = []
    for split, table in load_splits(dataset, config_name or None).items():
        source = f"{dataset}, split {split!r}"
        check_columns(table.column_names, columns, f"{source}: ", data_key)
        found += _sentences(table, columns, source)
    return found


def _sentences(table: Any, columns: Mapping[str, str], source: str) -> list[Sentence]:
    def read(cells: Sequence[Any], where: str) -> Sentence:
        pairs = zip(cells, columns.values(), strict=True)
        return tuple([text_of(cell, f"{where}, column {column!r}") for cell, column in pairs])

    rows = zip(*(table[column] for column in columns.values()), strict=True)
    return read_each(f"{source}: row", enumerate(rows, start=1), read)


def load_splits(name: str, config_name: str | None) -> Mapping[str, Any]:
    """Return the splits of a data set of the hub, or of a folder.

    Raises:
        DataError: It cannot be loaded.
        ConfigError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        message = "data sets of the Hugging Face hub need the package `datasets`: pip install kd-lightning[hub]"
        raise ConfigError(message) from error
    try:
        loaded = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, config_name)
    except Exception as error:  # the hub's clients raise many types, all with one meaning for the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        wanted = name if config_name is None else f"{name} ({config_name})"
        raise DataError(f"cannot load the data set {wanted}: {reason[:300]}") from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def usual_splits(splits: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return which splits are for training, validation and test; the last two where there are any.

    Raises:
        DataError: It has no `train` split.
    """
    if "train" not in splits:
        raise DataError(f"data.name={name}: there is no split 'train'; it has {', '.join(splits)}")
    validation = next((split for split in VALIDATION if split in splits), None)
    found = {"train": "train", "validation": validation, "test": "test" if "test" in splits else None}
    return {part: split for part, split in found.items() if split is not None}


def read_parts(
    files: Mapping[str, str | None],
    name: str | None,
    config_name: str | None,
    of_file: Callable[[str, str], Rows],
    of_split: Callable[[Mapping[str, Any], str, str, str], Rows],
) -> dict[str, Rows | None]:
    """Read training, validation and test from files, or from the usual splits of a data set.

    Args:
        files: A file for each, or None.
        name: The data set, where there is one.
        config_name: Which of its configurations.
        of_file: Reads a file, given what it is for.
        of_split: Reads a split, given all splits, its name, the data set's and what it is for.

    Raises:
        ConfigError: Both are given, or neither.
    """
    if (files["train"] is None) == (name is None):
        raise ConfigError("give data.train_file or data.name, one of the two")
    if name is None:
        return {part: None if path is None else of_file(path, part) for part, path in files.items()}
    splits = load_splits(name, config_name)
    chosen = usual_splits(splits, name)
    return {part: of_split(splits, chosen[part], name, part) if part in chosen else None for part in files}


def _is_labelled(table: Any, label_column: str) -> bool:
    return label_column in table.column_names and not all(map(is_missing, table[label_column]))


def _stored_names(table: Any, label_column: str) -> list[str] | None:
    names = getattr(table.features.get(label_column), "names", None)
    return list(names) if names else None
