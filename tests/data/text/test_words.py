from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kd_lightning.data.text.tagged import Place, TaggedText, from_words, split_words
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.data.text.words import Windows, WordDataset, _counted, _runs, encode_words
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE

PLACE = Place("made", 1)
LONG = " ".join(f"word{i} unbelievable {i * 7}." for i in range(12))
PLAIN = ["Ada, from Paris.", "北京 is far (very).", LONG, "a", "tea\u200bpot \u200b end"]


def text(content: str) -> TaggedText:
    return TaggedText(content, split_words(content), None, PLACE)


TEXTS = [*map(text, PLAIN), from_words(["Ada", "Love lace", "."], None, PLACE)]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's and RoBERTa's kind, which tells words with a space before them apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PLAIN, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    )


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Llama's and T5's kind; without special tokens around a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PLAIN, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")  # type: ignore[no-untyped-call]


TOKENIZERS = {
    "wordpiece": lambda: load_tokenizer("wordpiece:80", PLAIN),
    "byte_level": byte_level,
    "sentence_pieces": sentence_pieces,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def rows(windows: Windows, flat: NDArray[Any]) -> list[list[int]]:
    return [flat[a:b].tolist() for a, b in zip(windows.offsets, windows.offsets[1:], strict=False)]


@pytest.mark.parametrize(("max_length", "stride"), [(512, 8), (16, 0), (16, 6), (16, 13)])
def test_every_word_begins_once_in_one_window(tokenizer: Any, max_length: int, stride: int) -> None:
    windows = encode_words(tokenizer, TEXTS, max_length, stride)
    begun: dict[int, list[int]] = {}
    every, flags = rows(windows, windows.words), rows(windows, windows.begins)
    for number, words, begins in zip(windows.texts, every, flags, strict=True):
        begun.setdefault(int(number), []).extend(w for w, first in zip(words, begins, strict=True) if first)
    assert begun == {i: list(range(len(text.words))) for i, text in enumerate(TEXTS)}
    assert max(windows.lengths) <= max_length
    assert windows.texts.tolist() == sorted(windows.texts.tolist())
    whole = np.bincount(windows.texts)[windows.texts] == 1
    assert windows.cut[whole].tolist() == [-1] * whole.sum()
    assert windows.cut[~whole].tolist() == windows.texts[~whole].tolist()
    assert whole.all() == (max_length == 512)


def test_a_words_first_token_is_what_the_tokenizer_makes_of_it(tokenizer: Any) -> None:
    whole = encode_words(tokenizer, TEXTS, 512, 0)
    cut = encode_words(tokenizer, TEXTS, 16, 8)
    for windows in (whole, cut):
        tokens: dict[tuple[int, int], int] = {}
        for place in np.flatnonzero(windows.begins):
            window = int(np.searchsorted(windows.offsets, place, side="right")) - 1
            tokens[int(windows.texts[window]), int(windows.words[place])] = int(windows.tokens[place])
        for i, text in enumerate(TEXTS[:4]):
            for number, (start, stop) in enumerate(text.words):
                word = text.text[max(start - text.text[:start].endswith(" "), 0) : stop]
                assert (
                    tokens[i, number]
                    == tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"][0]
                )


@given(
    st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=40), st.integers(4, 12),
    st.integers(4, 12), st.integers(0, 3),
)  # fmt: skip
def test_every_window_has_room_for_its_words_and_a_word_that_counts(
    counts: list[tuple[int, int]], room: int, other: int, stride: int
) -> None:
    lengths = [np.array(column) for column in zip(*counts, strict=True)]
    runs = _runs(lengths, [room, other], stride)
    counted = _counted(runs)
    assert all(counted)
    assert sorted(word for own in counted for word in own) == list(range(len(counts)))
    for run in runs:
        for column, most in zip(lengths, (room, other), strict=True):
            assert np.minimum(column, most)[list(run)].sum() <= most or len(run) == 1


def test_a_long_word_makes_two_windows_and_no_more() -> None:
    assert len(_runs([np.array([1] * 40 + [200] + [1] * 40)], [126], 32)) == 3


def test_single_windows_are_the_texts_tokens() -> None:
    tokenizer = TOKENIZERS["wordpiece"]()
    windows = encode_words(tokenizer, TEXTS[:4], 512, 0)
    assert rows(windows, windows.tokens) == tokenizer(PLAIN[:4])["input_ids"]
    byte_pairs = byte_level()
    windows = encode_words(byte_pairs, [text("Ada from Paris")], 512, 0)
    assert windows.tokens.tolist() == byte_pairs("Ada from Paris")["input_ids"]


def test_windows_share_tokens_and_a_word_counts_where_most_stands_around_it() -> None:
    tokenizer = TOKENIZERS["wordpiece"]()
    long = from_words(["a"] * 10, None, PLACE)
    windows = encode_words(tokenizer, [long], 8, 4)  # six tokens of the text in each, four of them shared
    assert windows.lengths.tolist() == [8, 8, 8]
    counted = [[word for word in words if word >= 0] for words in rows(windows, windows.words)]
    assert counted == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_batches_pad_and_mark_the_first_tokens() -> None:
    tokenizer = load_tokenizer("wordpiece:10", PLAIN)  # of single characters
    windows = encode_words(tokenizer, [text("word a"), text("a")], 32, 4)
    labels = np.where(windows.words >= 0, windows.words, IGNORE).astype(np.int64)
    pad = int(tokenizer.pad_token_id)
    first, every = (WordDataset({"": windows}, labels, every, range(2), {"": pad})[[0, 1]] for every in (False, True))
    pieces = len(tokenizer.tokenize("word"))
    assert pieces > 1
    assert first["keep"].int().tolist() == [[0, 1, *[0] * (pieces - 1), 1, 0], [0, 1, *[0] * (pieces + 1)]]
    assert every["keep"].int().tolist() == [[0, *[1] * pieces, 1, 0], [0, 1, *[0] * (pieces + 1)]]
    assert every["begins"].equal(first["keep"])
    assert "begins" not in first
    expected = tokenizer(["word a", "a"], padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        assert first[name].equal(expected[name])
    assert first["index"].tolist() == [0, 1]
    assert first["window_of"].tolist() == [-1, -1]
    assert first["labels"][1].tolist() == [IGNORE, 0, *[IGNORE] * (pieces + 1)]


def test_a_stride_that_leaves_no_step_is_refused() -> None:
    tokenizer = TOKENIZERS["wordpiece"]()
    with pytest.raises(ConfigError, match=r"data\.stride=6: expected less than the 6 tokens .* data\.max_length=8"):
        encode_words(tokenizer, TEXTS, 8, 6)
