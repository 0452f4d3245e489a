from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kd_lightning.data.text.augment import MASK
from kd_lightning.data.text.corpus import Sentence
from kd_lightning.data.text.dataset import TokenDataset
from kd_lightning.data.text.tokens import (
    TokenStore,
    encode_batch,
    encode_store,
    load_tokenizer,
    sentences_digest,
    tokenizer_fingerprint,
    write_tokenizer,
)
from kd_lightning.runtime.errors import ConfigError

TEXTS = [("the film is short",), ("这部电影很长，也很美",), ("word " * 40,), ("a",)]
WORDS = [text for sentence in TEXTS for text in sentence]


def encode(tokenizer: Any, sentences: Sequence[Sentence], max_length: int, cache: Path) -> TokenStore:
    return encode_store(tokenizer, sentences, sentences_digest(sentences).hexdigest(), max_length, cache)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return load_tokenizer("wordpiece:80", WORDS)


def test_learned_pieces_cover_chinese_and_are_numbered_alike(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.tokenize("电影") == ["电", "影"]
    assert tokenizer.unk_token_id not in tokenizer(WORDS[1])["input_ids"]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert tokenizer("a", "a")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.decode(tokenizer("the film")["input_ids"]) == "[CLS] the film [SEP]"
    prints = {tokenizer_fingerprint(load_tokenizer("wordpiece:80", WORDS)) for _ in range(5)}
    assert prints == {tokenizer_fingerprint(tokenizer)}
    assert tokenizer_fingerprint(load_tokenizer("wordpiece:80", WORDS[:2])) not in prints


def test_batches_are_what_the_tokenizer_gives(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = encode(tokenizer, TEXTS, 12, tmp_path)
    batch = store.batch(np.array([3, 0, 2]))
    chosen = [WORDS[3], WORDS[0], WORDS[2]]
    expected = tokenizer(chosen, truncation=True, max_length=12, padding=True, return_tensors="pt")
    assert batch["input_ids"].equal(expected["input_ids"])
    assert batch["attention_mask"].equal(expected["attention_mask"])
    assert "token_type_ids" not in batch
    assert store.batch(np.array([3]))["input_ids"].shape == (1, 3)


def test_pairs_have_types(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pairs = [(first, second) for first in WORDS[:2] for second in WORDS]
    batch = encode(tokenizer, pairs, 16, tmp_path).batch(np.arange(len(pairs)))
    columns = [list(column) for column in zip(*pairs, strict=True)]
    expected = tokenizer(*columns, truncation=True, max_length=16, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].equal(expected[name])


def test_in_chunks_all_is_the_same(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    pairs = [(first, second) for first in WORDS for second in WORDS]
    whole, name = encode(tokenizer, pairs, 9, tmp_path / "whole"), sentences_digest(pairs).hexdigest()
    monkeypatch.setattr("kd_lightning.data.text.tokens.CHUNK", 3)
    chunked = encode(tokenizer, pairs, 9, tmp_path / "chunked")
    assert (
        sentences_digest(pairs).hexdigest()
        == name
        == hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()
    )
    for entry in ("tokens", "offsets", "types"):
        assert np.array_equal(getattr(whole, entry), getattr(chunked, entry))


def test_a_batch_encoded_now_is_the_stored_one(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for sentences in ([*TEXTS, (f"a {MASK} is masked",)], [("a film", MASK), ("the", "short word")]):
        stored = encode(tokenizer, sentences, 12, tmp_path).batch(np.arange(len(sentences)))
        tokenizer.padding_side = "left"
        made = encode_batch(tokenizer, sentences, 12)
        tokenizer.padding_side = "right"
        assert made.keys() == stored.keys()
        assert all(made[name].equal(stored[name]) for name in made)
        assert tokenizer.mask_token_id in made["input_ids"]


def test_cut_sentences_are_counted(tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO, logger="kd_lightning")
    for _ in range(2):
        encode(tokenizer, TEXTS, 20, tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 4 sentences were cut to 20 tokens (data.max_length)"
    ]


@pytest.mark.parametrize("damage", ["missing", "short", "foreign", "meta"])
def test_a_damaged_cache_is_written_anew(tokenizer, tmp_path: Path, damage: str) -> None:  # type: ignore[no-untyped-def]
    store = encode(tokenizer, TEXTS, 12, tmp_path)
    whole = np.array(store.tokens)
    tokens = store.folder / "tokens.int32"
    if damage == "missing":
        tokens.unlink()
    elif damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-8])
    elif damage == "foreign":
        np.zeros(3, np.int32).tofile(tokens)
    else:
        (store.folder / "meta.json").write_text("{")
    again = encode(tokenizer, TEXTS, 12, tmp_path)
    assert np.array_equal(again.tokens, whole)
    assert [entry.name for entry in tmp_path.iterdir()] == [again.folder.name]


def test_a_flipped_bit_in_any_file_is_noticed_and_said(
    tokenizer,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = encode(tokenizer, TEXTS, 12, tmp_path)
    content = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    assert set(content) == {"tokens.int32", "offsets.npy", "meta.json"}
    for name, bytes_ in content.items():
        for place in range(0, len(bytes_), max(len(bytes_) // 8, 1)):
            damaged = bytearray(bytes_)
            damaged[place] ^= 1 << place % 8
            (whole.folder / name).write_bytes(bytes(damaged))
            caplog.clear()
            again = encode(tokenizer, TEXTS, 12, tmp_path)
            assert name in caplog.text
            assert "tokenising again" in caplog.text
            assert np.array_equal(again.tokens, whole.tokens)
            assert np.array_equal(again.offsets, whole.offsets)


def test_other_content_has_another_folder(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    other = load_tokenizer("wordpiece:80", WORDS[:2])
    stores = [
        encode(tokenizer, TEXTS, 12, tmp_path),
        encode(tokenizer, TEXTS, 13, tmp_path),
        encode(tokenizer, TEXTS[::-1], 12, tmp_path),
        encode(other, TEXTS, 12, tmp_path),
    ]
    assert len({store.folder for store in stores}) == 4
    tokenizer.truncation_side = "left"
    assert encode(tokenizer, TEXTS, 12, tmp_path).folder not in {store.folder for store in stores}
    tokenizer.truncation_side = "right"
    tokenizer("a", truncation=True, max_length=3, padding=True)  # leaves its marks on the tokenizer
    assert encode(tokenizer, TEXTS, 12, tmp_path).folder == stores[0].folder


def test_a_data_set_travels_as_paths(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sentences = [(f"{text} {i}",) for i in range(500) for text in WORDS]
    store = encode(tokenizer, sentences, 12, tmp_path)
    data = TokenDataset({"": store}, np.arange(len(sentences)), range(10, 20))
    travelled = pickle.dumps(data.stores)
    assert len(travelled) < 1000
    assert pickle.loads(travelled)[""].batch(np.array([5]))["input_ids"].equal(store.batch(np.array([5]))["input_ids"])
    batch = data[[0, 3]]
    assert batch["index"].tolist() == batch["labels"].tolist() == [10, 13]
    assert data.lengths.tolist() == store.lengths[10:20].tolist()


@pytest.mark.parametrize("name", ["wordpiece", "wordpiece:many", "wordpiece:3"])
def test_a_bad_size_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a vocabulary size after the colon"):
        load_tokenizer(name, WORDS)


def test_a_tokenizer_that_is_nowhere_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    for name in (str(tmp_path), "no-such-tokenizer-of-anyone"):
        with pytest.raises(
            ConfigError,
            match=r"expected minilm, .*wordpiece:SIZE, bpe:SIZE, a folder.* tokenizer of teacher\.checkpoint",
        ) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


def test_a_saved_tokenizer_is_loaded_from_its_folder(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(WORDS)["input_ids"] == tokenizer(WORDS)["input_ids"]
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_that_was_used_is_written_as_one_that_was_not(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_tokenizer(tokenizer, tmp_path / "new")
    tokenizer(["a", "b"], padding=True, truncation=True, max_length=3)
    write_tokenizer(tokenizer, tmp_path / "used")
    for file in (tmp_path / "new").iterdir():
        assert (tmp_path / "used" / file.name).read_bytes() == file.read_bytes()


def test_a_text_without_any_token_has_one(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace("-", "")
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    sentences = [("-",), ("a a",), ("- -",)]
    expected = [[1, 0], [2, 2], [1, 0]]
    store = encode_store(tokenizer, sentences, sentences_digest(sentences).hexdigest(), 8, tmp_path)
    assert store.batch(np.arange(3))["input_ids"].tolist() == expected
    found = encode_batch(tokenizer, sentences, 8)
    assert found["input_ids"].tolist() == expected
    assert found["attention_mask"].sum(1).tolist() == [1, 2, 1]
    assert encode_batch(tokenizer, [("-",)], None)["input_ids"].tolist() == [[1]]
