"""Generated texts behind a corpus: what is trained on, what counts, and that all else stays as it was."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from kd_lightning.data import CorpusData
from kd_lightning.data.corpus.blocks import Packing
from kd_lightning.data.corpus.generated import written
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.types import IGNORE, Batch
from tests.data.corpus.test_chat import data as conversations
from tests.data.corpus.test_chat import talks, tokenizer
from tests.data.corpus.texts import data, made, source

__all__ = ["tokenizer"]

PROMPTS = [[5, 6, 7], [8, 9], [5, 5]]
NEW = [[40, 41, 42, 43], [44, 45], [46] * 9]


def taught(own: CorpusData, originals: bool = True) -> CorpusData:
    texts = [written(prompt, new) for prompt, new in zip(PROMPTS, NEW, strict=True)]
    return own.with_texts(source(texts), originals)


def counted(batch: Batch) -> list[int]:
    """Return the tokens that are predicted."""
    rows = next_tokens(batch)
    return sorted(rows["labels"][rows["keep"]].tolist())


@pytest.mark.parametrize("packing", ["documents", "concat", "none"])
def test_only_generated_tokens_count(tmp_path: Path, packing: Packing) -> None:
    more = taught(data(tmp_path, made(30), packing=packing), originals=False)
    batches = list(more.train_dataloader())
    assert sorted(token for batch in batches for token in counted(batch)) == sorted(itertools.chain(*NEW))
    assert all(set(batch) == set(next(iter(more.val_dataloader()))) for batch in batches)
    texts = {tuple(batch["input_ids"][0].tolist()) for batch in more.with_batches(batch_size=1).train_dataloader()}
    whole = [[*prompt, *new] for prompt, new in zip(PROMPTS, NEW, strict=True)]
    assert texts == {tuple(whole[0] + whole[1]), tuple(whole[2])} or packing == "none"
    assert sum(map(len, texts)) == sum(map(len, whole))


def test_originals_are_trained_on_beside_them_and_everything_else_stays(tmp_path: Path) -> None:
    own = data(tmp_path, made(30), batch_size=4)
    more = taught(own)
    assert more.sizes == {**own.sizes, "generated": 2}
    trained = torch.cat([batch["index"] for batch in more.train_dataloader()]).tolist()
    assert sorted(trained) == [*range(own.sizes["train"]), own.num_examples, own.num_examples + 1]
    mixed = next(b for b in more.train_dataloader() if (b["index"] >= own.num_examples).any())
    for row, index in enumerate(mixed["index"].tolist()):  # as each is alone, padded
        alone = more._dataset("train", "generated")[[index]]
        for name in alone.keys() - {"index"}:
            size = alone[name].shape[1]
            assert torch.equal(mixed[name][row, :size], alone[name][0]), name
        assert (mixed["labels"][row, size:] == IGNORE).all()
        assert not mixed["attention_mask"][row, size:].any()
    plain = more.select(pool=False)
    assert plain.fingerprint == own.fingerprint == own.select(pool=False).fingerprint
    assert plain.labelled_examples == more.labelled_examples == own.labelled_examples
    for a, b in zip(plain.train_dataloader(), own.train_dataloader(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for a, b in zip(more.test_dataloader(), own.test_dataloader(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    prints = {more.fingerprint, own.fingerprint, taught(own, originals=False).fingerprint}
    assert len(prints) == 3
    assert taught(own).fingerprint == more.fingerprint
    assert own.teacher_key != more.teacher_key
    everything = torch.cat([batch["index"] for batch in more.all_dataloader()])
    assert sorted(everything.tolist()) == list(range(more.num_examples))


def test_prompts_are_beginnings_once_each(tmp_path: Path) -> None:
    own = data(tmp_path, [*made(12), *[f"the people {text}" for text in made(12)]], block_size=64, packing="none")
    blocks = [
        row[mask.bool()]
        for batch in own.labelled_dataloader()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    found = own.prompts(2)
    assert {tuple(one) for one in found} == {tuple(row[:2].tolist()) for row in blocks}
    assert len({tuple(one) for one in found}) == len(found) < len(blocks)


def test_prompts_of_conversations_are_all_before_each_turn(tmp_path: Path, tokenizer: Path) -> None:
    own = conversations(tmp_path, tokenizer, talks(30, turns=3))
    reader, found = own.tokenizer_of("student"), own.prompts(1)
    ends = [len(reader.decode(one).split("assistant\n")) - 1 for one in found]
    assert {1, 2, 3} == set(ends)
    assert all(reader.decode(one).endswith("<|im_start|>assistant\n") for one in found)
    long = found[ends.index(3)]
    assert [len(one) < len(long) and long[: len(one)] == one for one in found].count(True) == 2
    more = own.with_texts(source([written(long, [40, 41])]), originals=False)
    [batch] = more.train_dataloader()
    assert counted(batch) == [40, 41]
    assert int(batch["keep"].sum()) == 2
