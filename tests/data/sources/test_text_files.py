from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from kd_lightning.config.instantiate import build
from kd_lightning.data import HFDataset, Reviews, TextFiles
from kd_lightning.pipeline.validation import validate
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.types import IGNORE
from tests import ROOT

CHINESE = {
    "好评": ["这部电影很好看，画面也很美", "演员演得真好", "故事感人，值得再看"],
    "中评": ["电影一般，没有什么特别", "看过就忘了", "还可以吧"],
    "差评": ["太长了，又很无聊", "剧情很差", "浪费时间，不推荐"],
}


@pytest.fixture
def chinese(write_csv: Callable[..., Path]) -> Path:
    rows = [
        (f"{text}，第{i}次, 说「{i}」", label) for i in range(20) for label, texts in CHINESE.items() for text in texts
    ]
    return write_csv("评论.csv", rows, header=("评论", "类别"))


def make(path: Path, **options: Any) -> TextFiles:
    return TextFiles(**({"train_file": str(path), "tokenizer": "wordpiece:300"} | options))


def test_chinese_with_three_classes(chinese: Path, tmp_path: Path) -> None:
    (tmp_path / "更多.txt").write_text("没有标签的句子\n另一个句子\n", encoding="utf-8")
    options = {"text_column": "评论", "label_column": "类别", "views": 2, "transfer": [str(tmp_path / "更多.txt")]}
    data = make(chinese, **options)
    data.prepare()
    assert data.class_names == sorted(CHINESE)
    assert data.sizes == {"train": 126, "views": 252, "transfer": 2, "validation": 18, "test": 36}
    assert data.num_examples == 434
    batches = list(data.all_dataloader())
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(434))
    labels = {int(i): int(y) for batch in batches for i, y in zip(batch["index"], batch["labels"], strict=True)}
    assert all(labels[i] == IGNORE for i in range(126, 380))
    assert np.bincount([labels[i] for i in range(398, 434)]).tolist() == [12, 12, 12]
    assert all((batch["input_ids"][batch["attention_mask"] == 0] == 0).all() for batch in batches)
    shown = data.student_tokenizer.decode(batches[0]["input_ids"][0])
    assert "[CLS]" in shown
    text = data.encode(["这部电影很好看, 第3次"])
    assert int((text["input_ids"] == data.student_tokenizer.unk_token_id).sum()) == 0
    again = make(chinese, **options)
    again.prepare()
    assert again.fingerprint == data.fingerprint


@pytest.mark.parametrize("change", [{"views": 2}, {"max_length": 9}, {"split_seed": 1}, {"tokenizer": "wordpiece:60"}])
def test_fingerprint_follows_the_content_and_not_the_order(
    toy_csv: Callable[..., Path], change: dict[str, Any]
) -> None:
    path = toy_csv()
    base, same, other = make(path), make(path, seed=9, batch_size=4), make(path, **change)
    for data in (base, same, other):
        data.prepare()
    assert base.fingerprint == same.fingerprint != other.fingerprint


def test_training_batches(toy_csv: Callable[..., Path]) -> None:
    data = make(toy_csv(), views=1, batch_size=16)
    whole = list(data.train_dataloader())
    assert sorted(torch.cat([batch["index"] for batch in whole]).tolist()) == list(range(168))
    assert all(entry.dtype == torch.int64 for batch in whole for entry in batch.values())
    assert all(batch["attention_mask"].any(0).all() for batch in whole)  # no longer than the longest
    labelled = list(data.select(pool=False).train_dataloader())
    assert sorted(torch.cat([batch["index"] for batch in labelled]).tolist()) == list(range(84))
    again = list(data.with_batches(seed=0).train_dataloader())
    assert all(a["index"].equal(b["index"]) for a, b in zip(whole, again, strict=True))
    other = list(data.with_batches(seed=1).train_dataloader())
    assert not all(a["index"].equal(b["index"]) for a, b in zip(whole, other, strict=True) if len(a) == len(b))
    assert max(len(batch["index"]) for batch in data.with_batches(eval_batch_size=5).all_dataloader()) == 5


def test_worker_processes_deliver_the_same(toy_csv: Callable[..., Path]) -> None:
    path = toy_csv()
    for here, there in zip(make(path).train_dataloader(), make(path, num_workers=1).train_dataloader(), strict=True):
        assert all(here[name].equal(there[name]) for name in here)


def test_two_tokenizers(toy_csv: Callable[..., Path]) -> None:
    data = make(toy_csv(), teacher_tokenizer="wordpiece:75", views=1)
    both = next(iter(data.select("both").val_dataloader()))
    teacher = next(iter(data.select("teacher").val_dataloader()))
    student = next(iter(data.select("student").val_dataloader()))
    assert set(both) == {
        "input_ids",
        "attention_mask",
        "teacher_input_ids",
        "teacher_attention_mask",
        "labels",
        "index",
    }
    assert set(teacher) == set(student) == {"input_ids", "attention_mask", "labels", "index"}
    by_index = dict(zip(teacher["index"].tolist(), teacher["input_ids"], strict=True))
    for i, row, mask in zip(
        both["index"].tolist(), both["teacher_input_ids"], both["teacher_attention_mask"], strict=True
    ):
        assert row[mask == 1].tolist() == by_index[i][: int(mask.sum())].tolist()
    size = len(data.teacher_tokenizer)
    assert data.model_arguments("teacher") == {"num_classes": 3, "vocab_size": size, "pad_token_id": 0}
    assert data.model_arguments("student")["vocab_size"] == len(data.student_tokenizer) > size
    assert "teacher_input_ids" not in next(iter(make(toy_csv()).val_dataloader()))


def test_views_are_masked_with_each_tokenizers_own_token(toy_csv: Callable[..., Path]) -> None:
    data = make(toy_csv(), views=1, mask_probability=0.5, ngram_probability=0)
    pool = list(data.all_dataloader())
    mask = data.student_tokenizer.mask_token_id
    masked = {
        int(i) for batch in pool for i, row in zip(batch["index"], batch["input_ids"], strict=True) if mask in row
    }
    assert masked == set(range(84, 168))
    assert all(data.student_tokenizer.unk_token_id not in batch["input_ids"] for batch in pool)


def test_pairs(write_csv: Callable[..., Path]) -> None:
    rows = [(f"first {i}", f"second, {i * 7}", str(i % 2)) for i in range(60)]
    path = write_csv("pairs.csv", rows, header=("a", "b", "label"))
    data = make(path, text_column="a", text_pair_column="b", views=1)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "index"}
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
    assert set(data.encode([("one", "two")])) == {"input_ids", "attention_mask", "token_type_ids"}
    assert data.class_names == ["0", "1"]


def test_separate_files_are_used_as_given(toy_csv: Callable[..., Path]) -> None:
    files = {"validation_file": str(toy_csv("v.csv", 30, 1)), "test_file": str(toy_csv("t.csv", 33, 2))}
    data = make(toy_csv(), **files)
    data.prepare()
    assert data.sizes == {"train": 120, "views": 0, "transfer": 0, "validation": 30, "test": 33}
    half = make(toy_csv(), test_file=files["test_file"])
    half.prepare()
    assert half.sizes == {"train": 108, "views": 0, "transfer": 0, "validation": 12, "test": 33}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": -1}, r"data\.views=-1: expected 0 or more"),
        ({"batch_size": 0}, r"data\.batch_size=0: expected 1 or more"),
        ({"seed": 2**63}, r"data\.seed=9223372036854775808: expected a number below 2\*\*63"),
        ({"split_seed": 10**30}, r"data\.split_seed=1000000000000000000000000000000: expected a number below"),
        ({"max_length": 2}, r"data\.max_length=2"),
        ({"mask_probability": 1.5}, r"data\.mask_probability=1\.5"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction"),
    ],
)
def test_options_out_of_range(toy_csv: Callable[..., Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(toy_csv(), **options).prepare()


def test_errors_reach_the_user(toy_csv: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"no\.csv: no such file"):
        make(Path("no.csv")).prepare()
    with pytest.raises(DataError, match=r"toy\.csv: line 1: no column 'sentence'"):
        make(toy_csv(), text_column="sentence").prepare()
    with pytest.raises(ConfigError, match="expected 'student', 'teacher' or 'both'"):
        make(toy_csv()).select("studnet")  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [TextFiles, Reviews, HFDataset])
def test_every_option_is_known_to_jsonargparse(source: type) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(source, "data")
    text = parser.format_help()
    shared = ["tokenizer", "teacher_tokenizer", "max_length", "batch_size", "eval_batch_size", "views", "view_sets"]
    for name in [
        *shared,
        "transfer",
        "mask_probability",
        "ngram_probability",
        "seed",
        "split_seed",
        "num_workers",
        "cache_dir",
    ]:
        assert f"--data.{name} " in text
    assert "type: Any" not in text


@pytest.mark.parametrize("source", [TextFiles, Reviews, HFDataset])
def test_the_yaml_lists_every_option(source: type) -> None:
    names = {"TextFiles": "text_files", "Reviews": "reviews", "HFDataset": "hf_dataset"}
    path = ROOT / "conf" / "data" / f"{names[source.__name__]}.yaml"
    options = set(yaml.safe_load(path.read_text(encoding="utf-8"))) - {"_target_", "defaults"}
    parser = ArgumentParser()
    parser.add_class_arguments(source)
    assert options == set(parser.get_defaults().keys())


def test_examples_are_plain_data(chinese: Path) -> None:
    corpus = make(chinese, text_column="评论", label_column="类别").read()
    assert dataclasses.asdict(corpus)["class_names"] == sorted(CHINESE)


def test_class_names_may_be_numbers(write_csv: Callable[..., Path], composed: Callable[..., Any]) -> None:
    path = write_csv("stars.csv", [(f"text {i}", str(i % 3 - 1)) for i in range(30)])
    cfg = composed("data=text_files", f"data.train_file={path}", "data.class_names=[-1,0,1]")
    validate(cfg)
    assert build(cfg.data).read().class_names == ["-1", "0", "1"]
