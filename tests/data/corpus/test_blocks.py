from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning.data.corpus.blocks import Blocks, Packing, cut
from kd_lightning.data.corpus.splits import split_documents
from kd_lightning.runtime.errors import DataError
from kd_lightning.types import IGNORE
from tests.data.corpus.texts import made, stored

SIZE = 16


def blocks_of(folder: Path, packing: Any, texts: list[str] | None = None) -> tuple[Blocks, Any]:
    store, tokenizer = stored(made(12) if texts is None else texts, folder)
    found, _ = cut(store, {"train": np.arange(len(store))}, SIZE, packing, int(tokenizer.pad_token_id))
    return found, tokenizer


def everything(blocks: Blocks) -> dict[str, Tensor]:
    return blocks.batch(np.arange(len(blocks)))


@pytest.mark.parametrize("packing", ["documents", "concat"])
def test_packed_blocks_are_the_documents_one_after_the_other(tmp_path: Path, packing: str) -> None:
    blocks, _ = blocks_of(tmp_path, packing)
    batch = everything(blocks)
    whole = batch["input_ids"][batch["attention_mask"].bool()].tolist()
    assert whole == blocks.store.tokens.tolist()
    assert blocks.lengths[:-1].tolist() == [SIZE] * (len(blocks) - 1)


def test_each_document_has_blocks_of_its_own(tmp_path: Path) -> None:
    blocks, tokenizer = blocks_of(tmp_path, "none")
    batch = everything(blocks)
    found: list[int] = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        text = ids[mask].tolist()
        assert tokenizer.eos_token_id not in text[:-1]  # nothing of another document behind its end
        found += text
    assert len(found) >= len(blocks.store.tokens) - len(blocks.store)  # but for rests of one token
    assert "document_ids" not in batch


def test_positions_begin_again_with_each_document_and_each_block(tmp_path: Path) -> None:
    blocks, _ = blocks_of(tmp_path, "documents")
    batch = everything(blocks)
    for numbers, positions in zip(batch["document_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        for t, (number, position) in enumerate(zip(numbers, positions, strict=True)):
            begins = t == 0 or number == -1 or numbers[t - 1] != number
            assert position == (0 if begins else positions[t - 1] + 1)


def test_no_label_is_predicted_from_another_document(tmp_path: Path) -> None:
    blocks, _ = blocks_of(tmp_path, "documents")
    batch = everything(blocks)
    numbers, labels, ids = batch["document_ids"], batch["labels"], batch["input_ids"]
    first = numbers[:, 1:] != numbers[:, :-1]
    assert bool((labels[:, 1:][first] == IGNORE).all())
    assert bool((labels[:, 0] == IGNORE).all())
    rest = ~first & (numbers[:, 1:] >= 0)
    assert bool((labels[:, 1:][rest] == ids[:, 1:][rest]).all())
    assert int((labels != IGNORE).sum()) == int(rest.sum())


def test_one_text_predicts_across_documents(tmp_path: Path) -> None:
    batch = everything(blocks_of(tmp_path, "concat")[0])
    counted = batch["attention_mask"].bool()
    counted[:, 0] = False
    assert bool(((batch["labels"] != IGNORE) == counted).all())
    assert "position_ids" not in batch


def test_the_end_of_a_text_is_a_label_where_padding_has_the_same_id(tmp_path: Path) -> None:
    blocks, tokenizer = blocks_of(tmp_path, "none")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = everything(blocks)
    ends = (batch["labels"] == tokenizer.eos_token_id).sum()
    assert int(ends) == int((blocks.store.lengths % SIZE != 1).sum())  # but where the end begins a block
    assert bool((batch["labels"][~batch["attention_mask"].bool()] == IGNORE).all())


def test_bytes_stand_beside_the_tokens(tmp_path: Path) -> None:
    blocks, _ = blocks_of(tmp_path, "concat")
    batch = everything(blocks)
    assert int(batch["token_bytes"].sum()) == sum(len(text.encode()) for text in made(12))
    assert bool((batch["token_bytes"][~batch["attention_mask"].bool()] == 0).all())


def test_each_token_is_known_by_its_document_however_it_is_packed(tmp_path: Path) -> None:
    counts = {}
    for packing in ("documents", "concat", "none"):
        batch = everything(blocks_of(tmp_path / packing, packing)[0])
        number = batch["document_ids" if packing == "documents" else "of_document"]
        assert ("of_document" in batch) != ("document_ids" in batch)  # the latter would keep a document from others
        assert bool(((number == -1) == (batch["attention_mask"] == 0)).all())
        counts[packing] = number[number >= 0].bincount()
    assert torch.equal(counts["documents"], counts["concat"])
    assert len(counts["none"]) == len(counts["documents"])


@pytest.mark.parametrize("packing", ["documents", "concat", "none"])
def test_a_block_is_the_same_in_any_batch(tmp_path: Path, packing: str) -> None:
    blocks, _ = blocks_of(tmp_path, packing)
    batch = everything(blocks)
    for index in (0, len(blocks) - 1, len(blocks) // 2):
        alone = blocks.batch(np.array([index]))
        for name, entry in alone.items():
            assert entry[0].tolist() == batch[name][index, : entry.shape[1]].tolist()


def test_splits_have_blocks_of_their_own(tmp_path: Path) -> None:
    store, _ = stored(made(12), tmp_path)
    parts = {"train": np.array([5, 1, 2, 0]), "validation": np.array([3]), "test": np.array([4, 6])}
    blocks, counts = cut(store, parts, SIZE, "documents", 0)
    assert sum(counts) == len(blocks)
    numbers = everything(blocks)["document_ids"]
    for name, start, stop in zip(parts, [0, counts[0], sum(counts[:2])], np.cumsum(counts).tolist(), strict=True):
        found = numbers[start:stop]
        assert list(dict.fromkeys(found[found >= 0].tolist())) == parts[name].tolist()


def test_a_limit_takes_the_first_tokens(tmp_path: Path) -> None:
    store, _ = stored(made(12), tmp_path)
    parts = {"train": np.arange(12)}
    whole, _ = cut(store, parts, SIZE, "concat", 0)
    some, _ = cut(store, parts, SIZE, "concat", 0, {"train": 40})
    assert some.lengths.tolist() == [16, 16, 8]
    assert some.batch(np.arange(2))["input_ids"].tolist() == whole.batch(np.arange(2))["input_ids"].tolist()


@pytest.mark.parametrize("packing", ["documents", "concat", "none"])
def test_a_spread_takes_blocks_from_all_over_a_split(tmp_path: Path, packing: Packing) -> None:
    store, _ = stored(made(30), tmp_path)
    parts = {"train": np.arange(10), "validation": np.arange(10, 30)}
    whole, (first, all_of_them) = cut(store, parts, SIZE, packing, 0)
    some, (same, fewer) = cut(store, parts, SIZE, packing, 0, spread={"validation": 160})
    assert same == first
    assert int(some.lengths[first:].sum()) == pytest.approx(160, abs=SIZE)
    places = [whole.begins.tolist().index(begin) for begin in some.begins[first:].tolist()]
    assert len(set(places)) == fewer == len(places)
    assert places[0] - first < all_of_them / fewer
    assert first + all_of_them - 1 - places[-1] <= all_of_them / fewer
    assert cut(store, parts, SIZE, packing, 0, spread={"validation": 10**6})[1] == [first, all_of_them]


def test_a_split_with_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    store, _ = stored(["a", "b c d e f"], tmp_path, end=False)
    with pytest.raises(DataError, match="the test split has 1 tokens"):
        cut(store, {"train": np.array([1]), "test": np.array([0])}, SIZE, "documents", 0)


def test_copies_of_a_text_stay_together() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 50).astype(np.uint64)[np.arange(150) % 50]
    found = split_documents(hashes, {"validation": 5, "test": 10}, seed=3)
    texts = {name: set(hashes[positions].tolist()) for name, positions in found.items()}
    assert {name: len(text) for name, text in texts.items()} == {"train": 35, "validation": 5, "test": 10}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(150))


def test_a_split_follows_from_texts_and_seed_alone() -> None:
    hashes = np.random.default_rng(1).integers(0, 2**63, 40).astype(np.uint64)
    order = np.random.default_rng(2).permutation(40)
    one, two = (split_documents(each, {"test": 8}, seed=0) for each in (hashes, hashes[order]))
    assert set(hashes[one["test"]].tolist()) == set(hashes[order][two["test"]].tolist())
    other = split_documents(hashes, {"test": 8}, seed=1)
    assert other["test"].tolist() != one["test"].tolist()
