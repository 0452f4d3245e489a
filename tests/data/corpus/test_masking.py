"""Masks: which tokens, how many, and that they follow from block, mask and seed alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kd_lightning.data.corpus.masking import MaskedDataset, Masking
from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.types import IGNORE, Batch
from tests.data.corpus.texts import data, made

MASK, SPECIAL, V = 4, np.arange(5), 60
MASKING = Masking(0.15, MASK, SPECIAL, V, seed=0)
Ints = NDArray[np.int64]


def texts(rows: int = 400, length: int = 100) -> Ints:
    return np.random.default_rng(0).integers(5, V, (rows, length))


def masked(ids: Ints, masking: Masking = MASKING, turn: int = 0) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    numbers = np.arange(len(ids), dtype=np.uint64)
    return masking(ids, ids != 0, numbers, np.full(len(ids), turn))


def test_so_many_are_chosen_and_so_many_of_them_masked() -> None:
    ids = texts()
    found, places, keep = masked(ids)
    assert keep.all()
    assert places.shape == (400, 15)
    assert (np.diff(places) > 0).all()
    new, old = np.take_along_axis(found, places, 1), np.take_along_axis(ids, places, 1)
    # of 6,000: three standard errors are 0.016 and 0.012; a random token is the old one in 1 of 55
    assert (new == MASK).mean() == pytest.approx(0.8, abs=0.016)
    assert (new == old).mean() == pytest.approx(0.1 + 0.1 / 55, abs=0.012)
    other = new[(new != MASK) & (new != old)]
    assert other.min() >= 5
    assert len(np.unique(other)) == 55
    rest = np.ones_like(ids, bool)
    np.put_along_axis(rest, places, False, 1)
    assert (found[rest] == ids[rest]).all()
    assert np.bincount(places.flatten(), minlength=100).min() > 30  # each place is, in 60 of 400 texts


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 1), (9, 1), (10, 2), (50, 8)])
def test_every_text_has_a_masked_token(length: int, count: int) -> None:
    """15 % to the nearest: of ten 1.5, which numpy rounds to the even 2."""
    found, places, keep = masked(texts(30, length))
    assert (keep.sum(1) == count).all()
    assert places.shape == (30, count)
    assert found.shape == (30, length)


def test_special_tokens_and_padding_are_never_masked() -> None:
    ids = texts(50, 20)
    ids[:, 0], ids[:, 7], ids[:, 12], ids[:25, 13:] = 2, 1, 3, 0
    found, places, keep = masked(ids, Masking(0.9, MASK, SPECIAL, V, 0))
    assert (found[ids < 5] == ids[ids < 5]).all()
    assert (np.take_along_axis(ids, places, 1)[keep] >= 5).all()
    assert keep.sum(1).tolist() == [9] * 25 + [15] * 25  # 0.9 of 10 and 17
    nothing = masked(np.full((2, 3), 3))
    assert not nothing[2].any()
    assert nothing[1].shape == (2, 1)


def test_a_mask_follows_from_text_turn_and_seed_whatever_the_batch() -> None:
    ids = texts(20, 30)
    whole = masked(ids)
    assert all((a == b).all() for a, b in zip(whole, masked(ids), strict=True))
    some = np.array([7, 3], np.uint64)
    padded = np.pad(ids[some], ((0, 0), (0, 9)))
    found, places, _ = MASKING(padded, padded != 0, some, np.zeros(2, np.int64))
    assert (found[:, :30] == whole[0][some]).all()
    assert (places == whole[1][some]).all()
    for other in (masked(ids, turn=1), masked(ids, Masking(0.15, MASK, SPECIAL, V, seed=1))):
        assert (other[1] != whole[1]).any(1).mean() > 0.9


def corpus(folder: Path, count: int = 40, **options: Any) -> Any:
    given = {"tokenizer": "wordpiece:120", "mask_probability": 0.15, "packing": "none", "batch_size": 8, **options}
    return data(folder, made(count), **given)


def test_a_block_is_what_a_network_reads_of_its_text(tmp_path: Path) -> None:
    module = corpus(tmp_path)
    module.prepare()
    tokenizer = module.tokenizer_of("student")
    batch = next(iter(module.with_batches(eval_batch_size=64).test_dataloader()))
    places, keep = batch["masked_places"], batch["keep"]
    whole = batch["input_ids"].clone()
    rows = torch.arange(len(whole))[:, None].expand_as(places)
    whole[rows[keep], places[keep]] = batch["labels"][keep]
    assert (batch["labels"][~keep] == IGNORE).all()
    assert keep.any(1).all()
    for ids, mask in zip(whole, batch["attention_mask"], strict=True):
        real = ids[mask.bool()].tolist()
        assert len(real) <= 16
        assert real == tokenizer(tokenizer.decode(real[1:-1]))["input_ids"]
        assert any(tokenizer.decode(real[1:-1]) in text for text in made(40))
    assert (batch["of_document"][keep] >= 0).all()
    assert module.model_arguments("student")["block_size"] == 16


def seen(module: Any, epoch: int) -> dict[int, list[int]]:
    """What an epoch has of each block: its tokens by its index."""
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {
        int(index): row[mask.bool()].tolist()
        for batch in loader
        for index, row, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True)
    }


def test_epochs_take_turns_with_the_masks_which_have_an_index_each(tmp_path: Path) -> None:
    one, three = corpus(tmp_path), corpus(tmp_path, mask_sets=3)
    for module in (one, three):
        module.prepare()
    train = one.sizes["train"]
    assert one.sizes["masks"] == 0
    assert three.sizes == {**one.sizes, "masks": 2 * train}
    assert (three.labelled_examples, len(three.train_dataloader())) == (train, len(one.train_dataloader()))
    epochs = [seen(three, epoch) for epoch in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [
        list(range(turn * train, (turn + 1) * train)) for turn in (0, 1, 2, 0)
    ]
    assert epochs[3] == epochs[0]
    assert all(len(epochs[1][train + block]) == len(epochs[0][block]) for block in range(train))
    assert sum(epochs[1][train + block] != epochs[0][block] for block in range(train)) > 0.9 * train
    assert seen(one, 0) == seen(one, 1) == epochs[0]
    everything = {
        int(index): row[mask.bool()].tolist()
        for batch in three.all_dataloader()
        for index, row, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert sorted(everything) == list(range(three.num_examples))
    assert all(everything[index] == row for epoch in epochs for index, row in epoch.items())
    assert [len(everything[index]) for index in range(three.num_examples)] == three.lengths.tolist()


def test_new_masks_in_every_epoch_have_no_index_of_their_own(tmp_path: Path) -> None:
    module = corpus(tmp_path, mask_sets=None)
    module.prepare()
    assert not module.repeatable
    epochs = [seen(module, epoch) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(module.sizes["train"])) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 5
    stored = seen(corpus(tmp_path, mask_sets=3), 1)
    assert list(stored.values()) == list(epochs[1].values())
    assert corpus(tmp_path).repeatable


def test_evaluations_have_one_mask_and_the_fingerprint_says_which(tmp_path: Path) -> None:
    def validation(module: Any) -> list[Batch]:
        return list(module.val_dataloader())

    tokenizer = load_tokenizer("wordpiece:120", made(40))
    write_tokenizer(tokenizer, tmp_path / "tokenizer")
    fewer = {"train_tokens": 60, "tokenizer": str(tmp_path / "tokenizer")}
    whole = {"tokenizer": fewer["tokenizer"]}
    for packing in ("none", "concat"):
        a, b = (validation(corpus(tmp_path, packing=packing, **more)) for more in (fewer, whole))
        assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a[0]["input_ids"][0], a[0]["input_ids"][1])
    one, again, other = (validation(corpus(tmp_path, **more)) for more in ({}, {"mask_sets": 2}, {"split_seed": 1}))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])
    prints = set()
    for more in ({}, {"mask_sets": 2}, {"mask_probability": 0.3}, {"mask_probability": 0.0}):
        module = corpus(tmp_path, **more)
        module.prepare()
        prints.add(module.fingerprint)
    assert len(prints) == 4


def test_documents_that_stand_together_are_told_apart_in_the_scores(tmp_path: Path) -> None:
    module = corpus(tmp_path, packing="concat", block_size=32)
    module.prepare()
    tokenizer = module.tokenizer_of("student")
    batches = list(module.test_dataloader())
    inside = [row[1:-1].tolist().count(tokenizer.sep_token_id) for batch in batches for row in batch["input_ids"]]
    assert sum(inside) > 0
    assert any(len(row[row >= 0].unique()) > 1 for batch in batches for row in batch["of_document"])
    assert isinstance(module._training_dataset(), MaskedDataset)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask_probability": 1.0}, "data.mask_probability=1.0: expected a number from 0 to below 1"),
        ({"mask_probability": -0.1}, "data.mask_probability=-0.1: expected"),
        ({"mask_sets": 0}, "data.mask_sets=0: expected 1 or more, or null"),
        ({"mask_probability": 0.0, "mask_sets": 2}, "data.mask_sets=2: no token is masked; set data.mask_prob"),
        ({"mask_probability": 0.0, "mask_sets": None}, "data.mask_sets=null: no token is masked; set"),
        ({"packing": "documents"}, "data.packing=documents: networks that read both sides"),
        ({"cross_tokenizer": True}, "with data.cross_tokenizer=true: masked tokens are compared one by one"),
        ({"tokenizer": "trimmed:minilm"}, "with data.tokenizer=trimmed:minilm: masked tokens"),
        ({"tokenizer": "bpe:300"}, "data.tokenizer has no mask token: give that of a masked language model"),
        (
            {"block_size": 3},
            "data.block_size=3: 2 of these are the tokens that the tokenizer puts around a text; set 4",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        corpus(tmp_path, **options).prepare()


def test_one_document_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 different documents are too few to hold some out"):
        corpus(tmp_path, count=1).prepare()
