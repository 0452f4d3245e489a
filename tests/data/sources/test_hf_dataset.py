from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.data import HFDataset
from kd_lightning.runtime.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="the optional extra `hub` is not installed")


def table(
    count: int, start: int = 0, names: list[str] | None = None, unlabelled: bool = False, pair: bool = False
) -> Any:
    columns = {"sentence1" if pair else "sentence": [f"sentence {i}" for i in range(start, start + count)]}
    if pair:
        columns["sentence2"] = [f"other {i}" for i in range(count)]
    columns["label"] = [-1 if unlabelled else i % 2 for i in range(count)]
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = {name: datasets.Value("string") for name in columns} | {"label": label}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(path: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return str(path)


def make(name: str, **options: Any) -> HFDataset:
    return HFDataset(name, **({"tokenizer": "wordpiece:100", "text_column": "sentence"} | options))


def test_glue_has_no_test_labels(tmp_path: Path) -> None:
    names = ["negative", "positive"]
    hidden = table(20, 300, names, unlabelled=True)
    name = saved(tmp_path / "sst2", train=table(200, 0, names), validation=table(40, 200, names), test=hidden)
    data = make(name, config_name="sst2", text_column=None)
    data.prepare()
    assert data.class_names == names
    assert data.sizes == {"train": 180, "views": 0, "transfer": 0, "validation": 20, "test": 40}
    assert data.read().test.texts[0] == ("sentence 200",)


def test_labelled_splits_serve_as_they_are_called(tmp_path: Path) -> None:
    data = make(saved(tmp_path / "d", train=table(100), validation=table(20, 100), test=table(30, 200)))
    corpus = data.read()
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [100, 20, 30]
    assert corpus.class_names == ["0", "1"]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"validation_split": "validation"}, [80, 20, 20]),  # so the test is held out of training
        ({"test_split": "validation"}, [90, 10, 20]),
        ({}, [90, 10, 20]),
    ],
)
def test_two_splits(tmp_path: Path, options: dict[str, str], sizes: list[int]) -> None:
    corpus = make(saved(tmp_path / "d", train=table(100), validation=table(20, 100)), **options).read()
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == sizes


def test_one_split_and_pairs(tmp_path: Path) -> None:
    table(100, pair=True).save_to_disk(str(tmp_path / "rte"))
    corpus = make(str(tmp_path / "rte"), config_name="rte", text_column=None).read()
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [70, 10, 20]
    assert all(len(text) == 2 for text in corpus.train.texts)


def test_mnli_is_selected_and_tested_on_matched(tmp_path: Path) -> None:
    splits = {"train": table(100), "validation_mismatched": table(10, 300), "validation_matched": table(20, 100)}
    corpus = make(saved(tmp_path / "mnli", **splits)).read()
    assert len(corpus.test) == 20


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(tmp_path / "d", train=table(100), validation=table(20, 100))
    with pytest.raises(ConfigError, match=r"stsb .*regression"):
        make(name, config_name="stsb")
    with pytest.raises(ConfigError, match=r"data\.test_split='tset' is not a split of .*valid: train, validation"):
        make(name, test_split="tset").read()
    with pytest.raises(ConfigError, match=r"data\.train_split='trian'.*did you mean 'train'"):
        make(name, train_split="trian").read()
    with pytest.raises(DataError, match=r"split 'train': no column 'text'; valid: label, sentence"):
        make(name, text_column="text").read()
    with pytest.raises(DataError, match=r"row 1, column 'label': unknown label '0'"):
        make(name, class_names=["1", "2"]).read()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot load the data set") as caught:
        make(str(tmp_path / "empty")).read()
    assert "\n" not in str(caught.value)

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot load the data set glue \(sst2\): Couldn't reach"):
        make("glue", config_name="sst2").read()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install kd-lightning\[hub\]"):
        make(name).read()


def test_other_data_sets_are_for_the_teacher_to_label(tmp_path: Path) -> None:
    more = saved(tmp_path / "more", train=table(8, 300), test=table(4, 200))
    name = saved(tmp_path / "d", train=table(100), validation=table(20, 100), test=table(30, 200))
    transfer = make(name, transfer=[f"hf:{more}"]).read().transfer
    assert transfer == [(f"sentence {i}",) for i in range(300, 308)], "all splits, but none of our test sentences"


def test_a_data_set_to_label_has_the_column(tmp_path: Path) -> None:
    more = saved(tmp_path / "more", train=table(8, pair=True))
    name = saved(tmp_path / "d", train=table(100), validation=table(20, 100), test=table(30, 200))
    with pytest.raises(DataError, match=r"more, split 'train': no column 'sentence'; did you mean"):
        make(name, transfer=[f"hf:{more}"]).read()
    with pytest.raises(DataError, match=r"cannot load the data set .*nowhere \(sst2\)"):
        make(name, transfer=[f"hf:{tmp_path / 'nowhere'}:sst2"]).read()


def labelled(labels: list[Any], names: list[str] | None = None, start: int = 0) -> Any:
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("float64")
    features = datasets.Features({"sentence": datasets.Value("string"), "label": kind})
    texts = [f"text {i}" for i in range(start, start + len(labels))]
    return datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features=features)


def test_a_split_called_dev_is_for_validation(tmp_path: Path) -> None:
    name = saved(tmp_path / "d", train=table(100), dev=table(20, 100), test=table(30, 200))
    corpus = make(name).read()
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [100, 20, 30]


def test_numbers_of_a_class_label_are_positions_in_its_names_whatever_these_are(tmp_path: Path) -> None:
    names = ["2", "1", "nan"]
    parts = {part: labelled([0, 1, 2] * 5, names, start) for part, start in (("train", 0), ("validation", 20))}
    corpus = make(saved(tmp_path / "d", **parts, test=labelled([2, 1], names, 40))).read()
    assert (corpus.class_names, corpus.test.labels) == (names, [2, 1])
    corpus = make(str(tmp_path / "d"), class_names=["1", "nan", "2"]).read()
    assert corpus.test.labels == [1, 0], "the same names in another order stay whose they are"
    corpus = make(str(tmp_path / "d"), class_names=["two", "one", "none"]).read()
    assert corpus.test.labels == [2, 1], "other names take the places of those stored"
    with pytest.raises(ConfigError, match=r"data\.class_names=\['a', 'b'\]: .* has 3 classes, 2, 1, nan"):
        make(str(tmp_path / "d"), class_names=["a", "b"]).read()


def test_labels_are_read_as_those_of_files(tmp_path: Path) -> None:
    train, dev = labelled([1.0, 2.0, -100.0, 3.0]), labelled([2.0, 3.0], start=90)
    corpus = make(saved(tmp_path / "d", train=train, dev=dev, test=dev)).read()
    assert (corpus.class_names, corpus.test.labels) == (["1", "2", "3"], [1, 2])
    assert corpus.transfer == [("text 2",)]
    name = saved(tmp_path / "e", train=labelled([1.0, float("nan")]), dev=dev, test=dev)
    with pytest.raises(DataError, match=r"split 'train': row 2, column 'label': the label is missing"):
        make(name).read()
    name = saved(
        tmp_path / "f",
        train=labelled([1.0, 2.0, 3.0] * 4),
        validation=dev,
        test=labelled([float("nan"), -1.0], start=200),
    )
    assert make(name).read().test.texts == [("text 90",), ("text 91",)], "a test split without labels is none"
