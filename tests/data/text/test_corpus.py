from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from kd_lightning.data.text.corpus import Corpus, RawExamples, assemble, normalise, stratified_split
from kd_lightning.runtime.errors import ConfigError, DataError


def raw(labels: list[str], texts: list[str] | None = None, source: str = "a.csv") -> RawExamples:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    return RawExamples([(text,) for text in texts], labels, source, lambda i: f"{source}: line {i + 2}, column 'label'")


def build(
    train: RawExamples, validation: RawExamples | None = None, test: RawExamples | None = None, **options: Any
) -> Corpus:
    given = {"class_names": None, "validation_fraction": 0.1, "test_fraction": 0.2, "split_seed": 0} | options
    return assemble(train, validation, test, **given)


def test_split_is_stratified_seeded_and_complete() -> None:
    labels = np.array([0] * 600 + [1] * 300 + [2] * 100)
    parts = stratified_split(labels, [0.1, 0.2], 5, "abc", "a.csv")
    assert [len(part) for part in parts] == [700, 100, 200]
    assert sorted(position for part in parts for position in part) == list(range(1000))
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert np.bincount(labels[part]).tolist() == [round(600 * share), round(300 * share), round(100 * share)]
    assert parts == stratified_split(labels, [0.1, 0.2], 5, "abc", "a.csv")
    assert parts != stratified_split(labels, [0.1, 0.2], 6, "abc", "a.csv")


@pytest.mark.parametrize("fractions", [[0.0, 0.2], [0.5, 0.5], [1.2], [-0.1]])
def test_impossible_fractions(fractions: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_fraction or data\.test_fraction"):
        stratified_split([0, 1] * 10, fractions, 0, "ab", "a.csv")


def test_too_few_to_split() -> None:
    with pytest.raises(DataError, match="class 'b' has 2 different examples, too few to split into 3 splits"):
        build(raw(["a"] * 20 + ["b"] * 2))


def test_sentences_without_a_label_are_left_to_the_teacher() -> None:
    train = raw(["a", "-100", "b", "-100"])
    corpus = build(train, raw(["a", "b"], ["v", "w"]), raw(["a", "b"], ["x", "y"]), transfer=[("more",)])
    assert corpus.class_names == ["a", "b"]
    assert (corpus.train.texts, corpus.train.labels) == ([("text 0",), ("text 2",)], [0, 1])
    assert corpus.transfer == [("text 1",), ("text 3",), ("more",)]


def test_they_are_neither_validation_nor_test_sentences() -> None:
    with pytest.raises(DataError, match=r"v\.csv: line 3, column 'label': unknown label '-100'"):
        build(raw(["a", "b"]), raw(["a", "-100"], ["v", "w"], "v.csv"), raw(["a", "b"], ["x", "y"]))


def test_a_message_counts_them_in() -> None:
    with pytest.raises(DataError, match=r"a\.csv: line 4, column 'label': unknown label 'c'"):
        build(raw(["a", "-100", "c", "b"]), class_names=["a", "b"])


def test_duplicates_do_not_straddle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kd_lightning")
    texts = [f"Text  {i % 50}" if i < 50 else f"text {i % 50}" for i in range(100)]
    corpus = build(
        raw(["a", "b"] * 50, texts), transfer=[("TEXT 3",), ("other",)] + [(f"text {i}",) for i in range(50)]
    )
    everything = [normalise(text) for part in (corpus.train, corpus.validation, corpus.test) for text in part.texts]
    assert len(everything) == len(set(everything)) == 50
    assert all(text[0].startswith("Text") for text in corpus.train.texts)  # the first stays
    assert "a.csv: dropped 50 duplicates of 100 sentences" in caplog.text
    held = {normalise(text) for part in (corpus.validation, corpus.test) for text in part.texts}
    assert ("other",) in corpus.transfer
    assert not held & {normalise(text) for text in corpus.transfer}
    assert len(corpus.transfer) == 52 - len(held) - (normalise(("text 3",)) in held)


def test_given_splits_stay_whole_and_overlap_is_told(caplog: pytest.LogCaptureFixture) -> None:
    train, other = raw(["a", "b"] * 5, ["same"] * 10), raw(["b", "a"], ["same", "new"], "b.csv")
    corpus = build(train, other, other)
    assert len(corpus.train) == 10
    assert corpus.validation.labels == [1, 0]
    assert "1 of 2 test sentences are also training sentences" in caplog.text


@pytest.mark.parametrize(
    ("labels", "given", "names"),
    [
        (["pos", "neg"], None, ["neg", "pos"]),
        (["10", "9", "1"], None, ["1", "9", "10"]),
        (["1", "0"], ["bad", "good"], ["bad", "good"]),
        (["good", "0"], ["bad", "good"], ["bad", "good"]),
    ],
)
def test_class_names(labels: list[str], given: list[str] | None, names: list[str]) -> None:
    corpus = build(raw(labels), raw(labels), raw(labels), class_names=given)
    assert corpus.class_names == names
    assert corpus.train.labels == [names.index(label) if label in names else int(label) for label in labels]


def test_errors_of_labels() -> None:
    good = raw(["pos", "neg"])
    with pytest.raises(DataError, match=r"a\.csv: all 5 labels are 'x'"):
        build(raw(["x"] * 5))
    with pytest.raises(DataError, match=r"a\.csv: there are no examples"):
        build(raw([]))
    with pytest.raises(DataError, match=r"b\.csv: there are no examples"):
        build(good, raw([], source="b.csv"), good)
    with pytest.raises(DataError, match=r"b\.csv: line 3, column 'label': unknown label 'poss'; did you mean 'pos'\?"):
        build(good, raw(["neg", "poss"], source="b.csv"), good)
    with pytest.raises(DataError, match=r"a\.csv: line 2, column 'label': unknown label 'pos'; valid: bad, nice"):
        build(good, class_names=["bad", "nice"])
    with pytest.raises(DataError, match="unknown label '3'"):
        build(raw(["1", "2", "3"]), class_names=["1", "2"])
    with pytest.raises(DataError, match="unknown label '2'"):
        build(raw(["0", "1", "2"]), class_names=["bad", "nice"])
    for names in (["one"], ["a", "a"]):
        with pytest.raises(ConfigError, match=r"data\.class_names=.*two or more different"):
            build(good, class_names=names)
