"""Labels count as the same class in every format and spelling, and what is missing is no class."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning.data.labels import label_of
from kd_lightning.data.sources.files import FileReader
from kd_lightning.data.text.corpus import Corpus, RawExamples, assemble
from kd_lightning.runtime.errors import ConfigError, DataError

FORMATS = ("csv", "tsv", "jsonl", "parquet", "json")
SPELLINGS = ("{}", "{}.0", "{}.", "+{}", " {} ", "{}.000e+00", "0{}")


def write(path: Path, labels: Sequence[object]) -> Path:
    """Write sentences with these labels; in JSON and Parquet the labels keep their types."""
    rows = [{"text": f"sentence {path.stem} {i}", "label": label} for i, label in enumerate(labels)]
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        pd.DataFrame(rows).to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
    else:
        lines = map(json.dumps, rows)
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path


def corpus(train: Path, test: Path, class_names: Sequence[str] | None = None) -> Corpus:
    reader = FileReader()
    return assemble(
        reader.examples(train), reader.examples(test), reader.examples(test),
        class_names=class_names, validation_fraction=0.1, test_fraction=0.1, split_seed=0,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numbers=st.lists(st.integers(0, 1000), min_size=2, max_size=5, unique=True),
    kinds=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
    as_float=st.tuples(st.booleans(), st.booleans()),
    spelling=st.sampled_from(SPELLINGS),
)
def test_numbers_are_the_same_class_however_they_are_written(
    numbers: list[int], kinds: tuple[str, str], as_float: tuple[bool, bool], spelling: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        typed = [[float(n) if floats else n for n in numbers] for floats in as_float]
        train = write(Path(folder, f"train.{kinds[0]}"), typed[0] * 2)
        for name, labels in (("typed", typed[1]), ("spelled", [spelling.format(n) for n in numbers])):
            found = corpus(train, write(Path(folder, f"{name}.{kinds[1]}"), labels))
            assert found.class_names == [str(n) for n in sorted(numbers)]
            assert [found.class_names[int(code)] for code in found.test.labels] == [str(n) for n in numbers]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.sampled_from(["neg", "pos", "1 star", "Ü", "true"]), min_size=4, max_size=8),
    kinds=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
)
def test_names_are_the_same_in_every_format(labels: list[str], kinds: tuple[str, str]) -> None:
    labels += ["neg", "pos"]
    with tempfile.TemporaryDirectory() as folder:
        found = corpus(write(Path(folder, f"a.{kinds[0]}"), labels), write(Path(folder, f"b.{kinds[1]}"), labels))
        assert [found.class_names[int(code)] for code in found.test.labels] == labels


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("missing", [float("nan"), None, "NaN", "nan", "", "  "])
def test_what_is_missing_is_no_class(tmp_path: Path, kind: str, missing: object) -> None:
    labels = [1.0, 2.0, missing] if isinstance(missing, float) else ["neg", "pos", missing]
    path = write(tmp_path / f"a.{kind}", labels)
    with pytest.raises(DataError, match=r"a\..* (line|row|entry) [34], column 'label': the label is missing"):
        FileReader().examples(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("unlabelled", [-100, -100.0, "-100", "-100.0"])
def test_minus_100_is_for_the_teacher_to_label(tmp_path: Path, kind: str, unlabelled: object) -> None:
    labels = [type(unlabelled)(n) for n in (0, 1)] + [unlabelled]
    train, test = write(tmp_path / f"a.{kind}", labels), write(tmp_path / f"b.{kind}", labels[:2])
    found = corpus(train, test)
    assert (found.class_names, found.train.labels, found.transfer) == (["0", "1"], [0, 1], [("sentence a 2",)])
    with pytest.raises(DataError, match=r"label '-100': only training sentences may be unlabelled"):
        corpus(test, train)


def raw(labels: list[str], texts: list[str] | None = None) -> RawExamples:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    return RawExamples([(text,) for text in texts], labels, "a.csv", lambda i: f"a.csv: line {i + 2}")


def build(train: list[str], test: list[str], class_names: Sequence[str] | None = None) -> Corpus:
    return assemble(
        raw(train), raw(test), raw(test),
        class_names=class_names, validation_fraction=0.1, test_fraction=0.2, split_seed=0,
    )  # fmt: skip


def test_minus_1_is_a_class_only_by_name() -> None:
    with pytest.raises(DataError, match=r"a\.csv: line 2: the label -1 often .*data\.class_names=\[-1,0,1\]"):
        build(["-1", "0", "1"], ["0", "1"])
    assert build(["-1", "0", "1"], ["1", "-1"], ["-1", "0", "1"]).test.labels == [2, 0]
    with pytest.raises(DataError, match=r"unknown label '-1' \(it often stands for a missing one"):
        build(["0", "1"], ["-1"])


def test_numbers_are_positions_only_among_words_that_were_given_their_order() -> None:
    assert build(["neg", "pos"], ["1", "0"], ["pos", "neg"]).test.labels == [1, 0]
    with pytest.raises(DataError, match="unknown label '0': the classes are neg, pos; to number them, list them"):
        build(["neg", "pos"], ["0", "1"])
    for names in (["1", "2"], ["1.0", "2.0"], ["01", "02"]):
        with pytest.raises(DataError, match="unknown label '0'"):
            build(["1", "2"], ["1", "0"], names)
    with pytest.raises(DataError, match="unknown label '0'"):
        build(["0.5", "1.5"], ["0"], ["0.5", "1.5"])


def test_codes_keep_their_zeros_and_may_not_be_written_two_ways() -> None:
    found = build(["007", "010"], ["10", "7"])
    assert (found.class_names, found.test.labels) == (["007", "010"], [1, 0])
    with pytest.raises(DataError, match="line 4: the label '7' is '007' elsewhere; spell it one way"):
        build(["007", "010", "7"], ["7"])


def test_scores_are_refused_unless_they_are_named() -> None:
    with pytest.raises(DataError, match=r"line 3: the label 0\.5 is neither a name nor a whole number .*class_names"):
        build(["1", "0.5"], ["1"])
    assert build(["1", "0.5"], ["0.5", "1"], ["0.5", "1"]).test.labels == [0, 1]


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["1", "1.0"], ["-100", "a"]])
def test_class_names_that_cannot_be(names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.class_names=.* two or more different names, none of them -100"):
        build(["a", "b"], ["a"], names)


def test_spellings_are_told_apart_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert build(["Neg", "neg", "pos"], ["neg"]).class_names == ["Neg", "neg", "pos"]
    assert "a.csv: the classes 'Neg' and 'neg' differ in spelling only and count as 2" in caplog.text
    with pytest.raises(DataError, match=r"unknown label 'NEG'; did you mean 'neg'\?"):
        build(["neg", "pos"], ["NEG"])


def test_truth_is_the_same_in_json_and_csv() -> None:
    found = build(["True", "False"], ["true", "false"])
    assert (found.class_names, found.test.labels) == (["False", "True"], [1, 0])
    assert label_of(True, "") == "True"


@pytest.mark.parametrize("held_out", [True, False])
def test_contrary_labels_are_counted_and_shown(caplog: pytest.LogCaptureFixture, held_out: bool) -> None:
    texts = [f"text {i}" for i in range(20)] + ["Text  3", "text 4", "text 5"]
    labels = ["neg", "pos"] * 10 + ["neg", "pos", "pos"]
    part = None if held_out else raw(["neg"], ["other"])
    with caplog.at_level(logging.WARNING):
        assemble(
            raw(labels, texts), part, part,
            class_names=None, validation_fraction=0.1, test_fraction=0.2, split_seed=0,
        )  # fmt: skip
    fate = "the first of each stays" if held_out else "all are trained on"
    assert f"a.csv: 2 sentences have contradictory labels, and {fate}: " in caplog.text
    assert "'text 3' is 'pos' (a.csv: line 5) and 'neg' (a.csv: line 22); 'text 4' is" in caplog.text
