from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from kd_lightning.data import EmbeddingFiles
from kd_lightning.data.datamodule import Role
from kd_lightning.models.adapt import run_network
from kd_lightning.pipeline.networks import build_network
from kd_lightning.runtime.errors import ConfigError, DataError
from tests.toy_pairs import pairs, write_pairs

COLUMNS = {"text_column": "query", "positive_column": "found"}


@pytest.fixture
def made(tmp_path: Path, own_home: Path) -> Any:
    """Data on toy pairs."""
    path = write_pairs(tmp_path / "pairs.jsonl")

    def make(**options: Any) -> EmbeddingFiles:
        given = {"train_file": str(path), "tokenizer": "wordpiece:120", "batch_size": 8, "dimensions": 16, **COLUMNS}
        data = EmbeddingFiles(**given | options)
        data.prepare()
        return data

    return make


def test_training_batches_have_whole_groups(made: Any) -> None:
    data = made()
    assert data.sizes == {"train": 84, "transfer": 0, "validation": 12, "test": 24}
    assert data.labelled_examples == 42
    seen = []
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    for batch in batches:
        assert len(batch["index"]) <= 16
        assert batch["place"].tolist() == [0, 1] * (len(batch["index"]) // 2)
        assert torch.equal(batch["group"][::2], batch["group"][1::2])
        assert batch["labels"].isnan().all()
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(84))


def test_groups_that_are_left_out_give_the_teacher_their_texts_alone(made: Any) -> None:
    few, some, rest = (made(train_examples=10, transfer_examples=count) for count in (0, 12, None))
    assert [data.sizes["train"] for data in (few, some, rest)] == [20] * 3
    assert [data.sizes["transfer"] for data in (few, some, rest)] == [0, 24, 64]

    def texts(data: EmbeddingFiles, part: str) -> set[tuple[int, ...]]:
        rows = data._dataset(part, part)
        return {tuple(rows[[n]]["input_ids"][0].tolist()) for n in range(len(rows))}

    assert texts(some, "transfer") < texts(rest, "transfer"), "a smaller choice is part of a larger one"
    assert not texts(rest, "transfer") & texts(rest, "train")
    sizes = torch.cat([batch["group"] for batch in rest.train_dataloader()]).bincount()
    assert sorted(sizes[sizes > 0].tolist()) == [1] * 64 + [2] * 10
    alone = torch.cat([batch["group"] for batch in rest.select(pool=False).train_dataloader()]).bincount()
    assert alone[alone > 0].tolist() == [2] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transfer_examples": 1}, r"data\.transfer_examples=1, but 0 groups are left for it: use fewer"),
        ({"train_examples": 40, "transfer_examples": 3}, r"data\.transfer_examples=3, but 2 groups are left"),
        ({"transfer_examples": -1}, r"data\.transfer_examples=-1: expected 0 or more"),
    ],
)
def test_no_more_groups_give_texts_than_are_left(made: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**options)


def test_evaluations_go_through_texts_by_length_each_once(made: Any) -> None:
    data = made(eval_batch_size=8)
    ranges = {"val": (84, 96), "test": (96, 120), "all": (0, 120)}
    for name, (start, stop) in ranges.items():
        loader = getattr(data, f"{name}_dataloader")()
        index = [int(i) for batch in loader for i in batch["index"]]
        assert sorted(index) == list(range(start, stop))
        lengths = data.lengths[index]
        assert (np.diff(lengths) >= 0).all()
    few = data.few()
    assert few["place"].tolist() == [0, 1] * 4


def test_projectors_are_sized_by_training_texts_of_all_lengths(made: Any) -> None:
    """The first validation batch has the shortest texts alone, here queries."""
    data = made(eval_batch_size=8)
    assert set(next(iter(data.val_dataloader()))["place"].tolist()) == {0}
    index = data.connecting_batch()["index"].numpy()
    assert len(set(index)) == 8
    assert max(index) < data.sizes["train"]
    assert len(set(data.lengths[index])) > 1
    assert set(data.connecting_batch()["place"].tolist()) == {0, 1}
    assert np.array_equal(made(eval_batch_size=8).connecting_batch()["index"], index)
    assert len(made(eval_batch_size=500).connecting_batch()["index"]) == data.sizes["train"]


def test_tokens_are_those_of_the_texts(made: Any) -> None:
    data = made()
    texts = {text for pair in pairs() for text in pair}
    batch = next(iter(data.train_dataloader()))
    for ids in batch["input_ids"]:
        assert data.student_tokenizer.decode(ids, skip_special_tokens=True) in texts
    encoded = data.encode(["mail reader"])
    assert encoded["input_ids"].shape[0] == 1


def test_single_texts_pairs_and_triplets_in_one_file(tmp_path: Path, made: Any) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"query": "mail reader", "found": "it shows mail"}\n{"query": "a", "found": "b"}\n')
    train = tmp_path / "mixed.jsonl"
    records = [
        {"query": "one", "found": "uno"},
        {"query": "alone", "found": None},
        {"query": "two", "found": "dos"},
    ]
    train.write_text("\n".join(map(json.dumps, records)))
    more = tmp_path / "more.txt"
    more.write_text("another text\nmail reader\n")
    data = made(
        train_file=str(train), validation_file=str(held), test_file=str(held), transfer=[str(more)], batch_size=2
    )
    assert data.sizes == {"train": 5, "transfer": 1, "validation": 4, "test": 4}
    assert data.labelled_examples == 3
    index = sorted(int(i) for batch in data.train_dataloader() for i in batch["index"])
    assert index == list(range(6))
    without = sorted(int(i) for batch in data.select(pool=False).train_dataloader() for i in batch["index"])
    assert without == list(range(5))
    assert data.task.pairs
    triplets = tmp_path / "triplets.jsonl"
    triplets.write_text("".join(
        json.dumps({"query": q, "found": p, "wrong": [n, n + " too"]}) + "\n" for q, p, n in pairs(negatives=True)
    ))  # fmt: skip
    data = made(train_file=str(triplets), negative_column="wrong")
    batch = next(iter(data.train_dataloader()))
    assert batch["place"].reshape(-1, 4).tolist() == [[0, 1, 2, 3]] * (len(batch["place"]) // 4)


def test_plain_texts_have_no_baseline(tmp_path: Path, made: Any) -> None:
    train = tmp_path / "plain.txt"
    train.write_text("\n".join(f"some text {number}" for number in range(9)))
    held = write_pairs(tmp_path / "held.jsonl")
    data = made(train_file=str(train), validation_file=str(held), test_file=str(held))
    assert not data.task.pairs
    with pytest.raises(ConfigError, match="nothing is learned from them without a teacher"):
        data.task.terms()
    with pytest.raises(DataError, match="the validation split has no pairs"):
        made(train_file=str(train), positive_column=None, validation_fraction=0.3, test_fraction=0.3)


def test_scores_of_pairs(tmp_path: Path, made: Any) -> None:
    path = tmp_path / "scored.tsv"
    lines = [f"{q}\t{p}\t{number % 6}" for number, (q, p) in enumerate(pairs())]
    path.write_text("query\tfound\tlike\n" + "\n".join(lines) + "\n")
    data = made(train_file=str(path), score_column="like", most_score=5)
    assert data.task.scored
    assert data.task.monitor == "spearman"
    batch = next(iter(data.train_dataloader()))
    assert set(batch["score"].tolist()) <= {float(np.float32(i / 5)) for i in range(6)}
    assert data.title == "embeddings of scored pairs"


def test_what_decides_is_in_the_fingerprints(made: Any, tmp_path: Path) -> None:
    data = made()
    assert made().fingerprint == data.fingerprint
    assert made(max_length=16).fingerprint != data.fingerprint
    assert made(dimensions=8).fingerprint != data.fingerprint
    assert made(dimensions=8).labelled == data.labelled
    assert made(split_seed=1).labelled != data.labelled
    other = made(train_examples=20)
    assert other.labelled_examples == 20
    assert other.teacher_key != data.teacher_key
    assert made(dimensions=8).teacher_key == data.teacher_key


def test_two_tokenizers(made: Any) -> None:
    data = made(teacher_tokenizer="wordpiece:80")
    batch = next(iter(data.train_dataloader()))
    assert "teacher_input_ids" in batch
    alone = next(iter(data.select("teacher").train_dataloader()))
    assert "teacher_input_ids" not in alone
    assert "teacher_input_ids" not in next(iter(data.with_one_reader().train_dataloader()))


def test_networks_get_their_sizes_and_static_ones_the_frame(made: Any) -> None:
    data = made()
    found = data.model_arguments("student")
    tokenizer = data.student_tokenizer
    assert found["num_classes"] == 16
    assert found["special_tokens"] == sorted([tokenizer.cls_token_id, tokenizer.sep_token_id])
    assert found["single_token"] == [tokenizer.cls_token_id, -1, tokenizer.sep_token_id]


def test_a_teacher_has_its_own_width_where_it_has_one(made: Any, tmp_path: Path) -> None:
    data, path = made(max_length=16), str(tmp_path / "encoder")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(data.teacher_tokenizer), **sizes)).save_pretrained(path)
    encoder = {"_target_": "kd_lightning.models.sentence_encoder.sentence_encoder", "name": path}
    layer = {"_target_": "kd_lightning.models.bilstm.BiLSTM", "embedding_size": 4, "hidden_size": 4}

    def width(settings: dict[str, Any], role: Role) -> int:
        network, again = build_network(settings, data, role)
        found = run_network(network.eval(), data.few()).logits.shape[1]
        if role == "student" or settings is layer:
            assert again["num_classes"] == found
        return found

    assert width(encoder, "teacher") == 8
    assert width(encoder, "student") == width(layer, "student") == width(layer, "teacher") == 16
    assert width({**layer, "num_classes": 12}, "teacher") == 12
    with pytest.raises(ConfigError, match="student: num_classes=12, and the data have 16"):
        width({**layer, "num_classes": 12}, "student")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 1}, "data.dimensions=1: expected 2 or more"),
        ({"widths": [16]}, "data.widths: 16 is not between"),
        ({"train_examples": 99}, "data.train_examples=99, but there are 42"),
        ({"name": "x"}, "give data.train_file or data.name"),
    ],
)
def test_options_that_cannot_be(made: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**options)


def test_there_are_no_folds(made: Any) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.folds=3"):
        made().folds(3)
