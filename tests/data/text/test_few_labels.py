"""Fewer labels than texts: some sentences are trained on without theirs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.data import Corpus, Examples, TextData, TextFiles
from kd_lightning.runtime.errors import ConfigError

TRAIN = 84  # of the 120 toy sentences


@pytest.fixture
def make(toy_csv: Callable[..., Path], tmp_path: Path) -> Callable[..., TextFiles]:
    (tmp_path / "more.txt").write_text("more of the same\nand still more\n")
    given = {"train_file": str(toy_csv()), "tokenizer": "wordpiece:200", "transfer": [str(tmp_path / "more.txt")]}
    return lambda **options: TextFiles(**(given | options))


def drawn(data: TextData) -> Corpus:
    return data.drawn()


def test_a_smaller_choice_is_part_of_a_larger_one_and_even_over_the_classes(make: Callable[..., TextFiles]) -> None:
    whole, more, few = (drawn(make(train_examples=count)) for count in (None, 40, 20))
    assert set(few.train.texts) < set(more.train.texts) < set(whole.train.texts)
    assert sorted(Counter(few.train.labels).values()) == [6, 7, 7]
    assert few.train.texts == [text for text in whole.train.texts if text in set(few.train.texts)], "in their order"
    assert (few.validation, few.test, few.transfer) == (whole.validation, whole.test, whole.transfer)
    assert set(drawn(make(train_examples=20, seed=1)).train.texts) == set(few.train.texts)
    assert set(drawn(make(train_examples=20, split_seed=1)).train.texts) != set(few.train.texts)


def test_left_out_sentences_join_the_transfer_set_before_the_others(make: Callable[..., TextFiles]) -> None:
    whole = make().read()
    some, rest = (drawn(make(train_examples=20, transfer_examples=count)) for count in (30, None))
    assert (len(some.transfer), len(rest.transfer)) == (32, TRAIN - 20 + 2)
    assert some.transfer[-2:] == whole.transfer == [("more of the same",), ("and still more",)]
    assert {*rest.train.texts, *rest.transfer[:-2]} == set(whole.train.texts)
    assert not set(rest.train.texts) & set(rest.transfer)
    assert set(some.transfer) < set(rest.transfer)


def test_the_transfer_set_has_no_labels_and_changes_no_teacher(make: Callable[..., TextFiles]) -> None:
    alone, with_transfer = (make(train_examples=20, transfer_examples=count, views=1) for count in (0, 30))
    for data in (alone, with_transfer):
        data.prepare()
    assert with_transfer.sizes == {"train": 20, "views": 20, "transfer": 32, "validation": 12, "test": 24}
    labels = [int(label) for batch in with_transfer.train_dataloader() for label in batch["labels"]]
    assert labels.count(-100) == 20 + 32
    assert len(labels) == 72
    assert with_transfer.fingerprint != alone.fingerprint
    assert with_transfer.select(pool=False).fingerprint == alone.select(pool=False).fingerprint
    assert with_transfer.labelled == alone.labelled


def test_a_regression_draws_evenly_over_nothing() -> None:
    class Scores(TextData):
        def read(self) -> Corpus:
            def part(first: int, last: int) -> Examples:
                return Examples([(f"text {i}",) for i in range(first, last)], [i / 10 for i in range(first, last)])

            return Corpus(["score"], part(0, 30), part(30, 40), part(40, 50), regression=True)

    data = Scores(tokenizer="wordpiece:60", train_examples=10, transfer_examples=None)
    found = drawn(data)
    assert (len(found.train), len(found.transfer)) == (10, 20)
    assert all(text == (f"text {round(10 * label)}",) for text, label in zip(*vars(found.train).values(), strict=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train_examples": 0}, r"data\.train_examples=0: expected 1 or more"),
        ({"train_examples": 85}, r"data\.train_examples=85, but there are 84 to train on"),
        ({"transfer_examples": 1}, r"data\.transfer_examples=1, but 0 examples are left for it: use fewer"),
        ({"train_examples": 80, "transfer_examples": 5}, r"data\.transfer_examples=5, but 4 examples are left for it"),
        ({"transfer_examples": -1}, r"data\.transfer_examples=-1: expected 0 or more"),
    ],
)
def test_impossible_numbers_are_refused(make: Callable[..., TextFiles], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make(**options).prepare()


def test_classes_without_a_label_are_told(make: Callable[..., TextFiles], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        drawn(make(train_examples=20))
        assert not caplog.messages
        drawn(make(train_examples=2))
    assert caplog.messages == ["data.train_examples=2 leaves 1 classes without a training example"]
