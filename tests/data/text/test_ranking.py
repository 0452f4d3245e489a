from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from kd_lightning.data import RankingFiles
from kd_lightning.data.text.lists import RankedList, assemble_lists
from kd_lightning.data.text.negatives import Encoder
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.runtime.assets import home
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.runtime.seals import write_sealed
from tests.toy_lists import lists, write_lists
from tests.toy_pairs import pairs

COLUMNS = {"document_column": "documents", "grade_column": "grades"}


@pytest.fixture
def made(tmp_path: Path, own_home: Path) -> Any:
    """Data on toy queries."""
    path = write_lists(tmp_path / "queries.jsonl")

    def make(**options: Any) -> RankingFiles:
        given = {"train_file": str(path), "tokenizer": "wordpiece:120", "batch_size": 8, "eval_batch_size": 5}
        data = RankingFiles(**given | COLUMNS | options)
        data.prepare()
        return data

    return make


def test_batches_have_whole_queries_in_the_order_of_the_file(made: Any) -> None:
    data = made()
    assert data.sizes == {"train": 168, "validation": 24, "test": 48}
    assert data.labelled_examples == 42
    written = {record["query"]: record for record in lists()}
    for loader, whole in (
        (data.train_dataloader(), 168),
        (data.val_dataloader(), 24),
        (data.test_dataloader(), 48),
        (data.all_dataloader(), 240),
    ):
        seen: list[int] = []
        for batch in loader:
            assert batch["group"].reshape(-1, 4).unique(dim=1).shape[1] == 1
            texts = [
                data.student_tokenizer.decode(ids, skip_special_tokens=True).replace("[UNK]", "")
                for ids in batch["input_ids"]
            ]
            for start in range(0, len(texts), 4):
                record = next(one for query, one in written.items() if texts[start].startswith(query))
                assert texts[start : start + 4] == [f"{record['query']} {one}" for one in record["documents"]]
                assert batch["labels"][start : start + 4].tolist() == record["grades"]
            seen += batch["index"].tolist()
        assert sorted(seen) == sorted(set(seen))
        assert len(seen) == whole
    assert len(data.few()["index"]) == 16


def test_a_query_is_in_one_split_and_its_documents_may_be_in_several() -> None:
    queries = [RankedList(f"q{n % 40}", (f"d{n}", "shared"), (1.0, 0.0), f"s{n // 3}") for n in range(60)]
    corpus = assemble_lists(queries, None, None, fractions=(0.2, 0.2), split_seed=0, origin="made")
    parts = (corpus.train, corpus.validation, corpus.test)
    for key in ("query", "source"):
        values = [{getattr(one, key) for one in part} for part in parts]
        assert sum(map(len, values)) == len(set.union(*values))
    assert {one for part in parts for one in part} == set(queries)


def test_only_queries_that_can_be_scored_are_held_out(made: Any, tmp_path: Path) -> None:
    queries = [RankedList(f"q{n}", ("a", "b"), (float(n % 2), 0.0)) for n in range(40)]
    corpus = assemble_lists(queries, None, None, fractions=(0.2, 0.2), split_seed=0, origin="made")
    assert all(one.judged for one in corpus.validation + corpus.test)
    assert sum(not one.judged for one in corpus.train) == 20
    with pytest.raises(DataError, match="of 20 queries too few have a relevant document"):
        assemble_lists(queries[::2], None, None, fractions=(0.2, 0.2), split_seed=0, origin="made")
    alone = [{**one, "documents": one["documents"][:1], "grades": [1]} for one in lists()]
    path = tmp_path / "alone.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in alone))
    with pytest.raises(DataError, match=r"no query of the validation split .* or set data\.hard_negatives"):
        made(train_file=str(path))


def test_those_of_a_held_out_source_that_cannot_be_scored_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    queries = [RankedList(f"q{n}", ("a", "b"), (float(n % 3 == 0), 0.0), f"s{n // 3}") for n in range(60)]
    with caplog.at_level("INFO"):
        corpus = assemble_lists(queries, None, None, fractions=(0.2, 0.2), split_seed=0, origin="made")
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [36, 4, 4]
    assert all(one.relevant for one in corpus.validation + corpus.test)
    assert "made: left out 16 queries without a relevant document, whose sources are held out" in caplog.text


def test_queries_with_nothing_to_rank_are_counted(made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = lists()
    for record, grades in zip(records, ([3, 3, 3, 3], [1, 2, 3, 4], [1]), strict=False):
        record.update(documents=record["documents"][: len(grades)], grades=grades)
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    made(test_file=str(path))
    assert "3 of 60 queries of the test split have nothing to rank, and do not count" in caplog.text


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder of a sentence encoder."""
    tokenizer = load_tokenizer("wordpiece:200", [text for pair in pairs() for text in pair])
    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.usefixtures("own_home")
def test_what_an_encoder_finds_is_kept_by_all_that_decides(encoder: Path) -> None:
    queries, documents = [query for query, _ in pairs()], [text for _, text in pairs()]
    kinds = {"Transformer": "", "Pooling": "pooling"}
    named = [{"type": f"sentence_transformers.models.{kind}", "path": place} for kind, place in kinds.items()]
    (encoder / "pooling").mkdir()

    def found(mode: str = "mean", scales: bool = False, side: str = "right", act: str = "gelu") -> Any:
        (encoder / "pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
        more = [{"type": "sentence_transformers.models.Normalize", "path": "normalize"}] * scales
        (encoder / "modules.json").write_text(json.dumps(named + more))
        config = json.loads((encoder / "config.json").read_text())
        (encoder / "config.json").write_text(json.dumps({**config, "hidden_act": act}))
        searcher = Encoder(str(encoder), 4)
        searcher.tokenizer.truncation_side = side
        return searcher.nearest(queries, documents, 9).tolist()

    mean = found()
    assert mean == found()
    assert mean != found("cls")
    assert mean != found("max")
    assert mean != found(side="left")
    assert mean != found(act="relu")
    found(scales=True)
    assert len(list((home() / "negatives").iterdir())) == 6
    for folder in (home() / "negatives").iterdir():
        write_sealed(folder / "meta.json", {"other": 1})
    assert mean == found()


def test_an_encoder_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    wanted = "give a folder, minilm or a name on the Hugging Face hub"
    with pytest.raises(ConfigError, match=rf"^data\.negatives_by=\./nofolder: no such folder; {wanted}$"):
        Encoder("./nofolder", 8)
    BertModel(BertConfig(vocab_size=9, hidden_size=2, num_attention_heads=1)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"^data\.negatives_by={tmp_path}: "):
        Encoder(str(tmp_path), 8)


def test_hard_negatives_are_found_once_and_none_is_known(made: Any, encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": q, "yes": d}) + "\n" for q, d in [*pairs(), ("Mail Reader", "post")]))
    options = {"document_column": None, "grade_column": None, "positive_column": "yes", "train_file": str(path)}
    data = made(**options, hard_negatives=3, negatives_by=str(encoder))
    assert sum(data.sizes.values()) == 60 * 4 + 1
    known = {query: text for query, text in pairs()} | {"mail reader": "it shows every mail and is"}
    for batch in data.all_dataloader():
        for group in batch["group"].unique():
            rows = batch["group"] == group
            assert batch["labels"][rows].tolist()[-3:] == [0, 0, 0]
            texts = [data.student_tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"][rows]]
            assert len(set(texts)) == len(texts)
            query = next(one for one in known if texts[0].startswith(f"{one} "))
            assert not any(text.endswith(known[query]) for text in texts[-3:])
    kept = list((home() / "negatives").glob("*/found.npy"))
    assert len(kept) == 3
    for one in kept:
        one.write_bytes(b"broken")
    again = made(**options, hard_negatives=3, negatives_by=str(encoder))
    assert again.fingerprint == data.fingerprint
    assert made(**options, hard_negatives=2, negatives_by=str(encoder)).teacher_key != data.teacher_key
    graded = made(hard_negatives=2, negatives_by=str(encoder))  # those of validation and test have documents already
    assert graded.sizes == {"train": 42 * 6, "validation": 24, "test": 48}


def test_what_decides_is_in_the_fingerprints(made: Any, tmp_path: Path) -> None:
    data = made()
    assert made().fingerprint == data.fingerprint
    assert made(max_length=16).fingerprint != data.fingerprint
    assert made(max_length=16).labelled == data.labelled
    assert made(split_seed=1).labelled != data.labelled
    other = made(train_examples=20)
    assert other.labelled_examples == 20
    assert other.teacher_key != data.teacher_key
    graded = [{**record, "grades": [grade / 2 for grade in record["grades"]]} for record in lists()]
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in graded))
    assert made(train_file=str(path)).teacher_key == data.teacher_key
    assert made(train_file=str(path)).labelled != data.labelled


def test_networks_and_two_tokenizers(made: Any) -> None:
    data = made(teacher_tokenizer="wordpiece:80")
    assert data.model_arguments("student")["num_classes"] == 1
    assert data.input_format == {"max_length": 64, "texts": 2}
    batch = next(iter(data.train_dataloader()))
    assert {"token_type_ids", "teacher_token_type_ids", "labels", "group"} <= set(batch)
    assert np.isfinite(data.worth)
    assert data.encode([("mail reader", "it shows mail")])["token_type_ids"].max() == 1


def test_options_that_cannot_be(made: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_examples=99, but there are 42"):
        made(train_examples=99)
    with pytest.raises(ConfigError, match=r"give data\.train_file or data\.name"):
        made(name="x")
    with pytest.raises(ConfigError, match=r"teacher\.folds=3"):
        made().folds(3)


def test_a_data_set_of_datasets(made: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra hub)")
    table = datasets.Dataset.from_list(lists())
    table.save_to_disk(str(tmp_path / "whole"))
    found, expected = made(train_file=None, name=str(tmp_path / "whole")), made()
    assert found.labelled == expected.labelled
    broken = [{**record, "grades": [0] * 4} if n == 3 else record for n, record in enumerate(lists())]
    splits = {"train": table, "dev": datasets.Dataset.from_list(broken), "test": table}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "split"))
    with pytest.raises(DataError, match=r"split 'dev': row 4: the query '.*' has no relevant document"):
        made(train_file=None, name=str(tmp_path / "split"))
