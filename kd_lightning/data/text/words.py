"""Tagged words as tokens: which token begins which word, in windows that overlap where a text is long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.text.flat import Entry, FlatDataset
from kd_lightning.data.text.tagged import TaggedText
from kd_lightning.data.text.tokens import CHUNK, around_text
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


VERSION = 2
"""Goes up when texts become other windows, or other words count in them."""


@dataclass(frozen=True)
class Windows:
    """Texts as tokens, one after the other in flat arrays; a long text in several windows that overlap.

    A word counts in one window only: in that where it has most words on both sides.

    Attributes:
        tokens: Of all windows, `(T,)` int32.
        offsets: Where each window begins and the last one ends, `(N + 1,)` int64.
        words: The number in its text of the word that each token is of, -1 where that counts elsewhere, `(T,)` int32.
        texts: The number of the text that each window is of, `(N,)` int64.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    words: NDArray[np.int32]
    texts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each window, `(N,)`."""
        return np.diff(self.offsets)

    @property
    def begins(self) -> NDArray[np.bool_]:
        """Which tokens are the first of a word that counts here, `(T,)`."""
        first = np.ones(len(self.words), bool)
        first[1:] = self.words[1:] != self.words[:-1]
        first[self.offsets[:-1]] = True
        return first & (self.words >= 0)

    @property
    def cut(self) -> NDArray[np.int64]:
        """The number of each window's text, -1 where the window is all of it, `(N,)`."""
        windows = np.bincount(self.texts, minlength=1)
        return np.where(windows[self.texts] > 1, self.texts, -1)


def encode_words(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[TaggedText], max_length: int, stride: int
) -> Windows:
    """Return texts as windows of tokens; see `encode_alike`."""
    return encode_alike([tokenizer], texts, max_length, stride)[0]


def encode_alike(
    tokenizers: Sequence[PreTrainedTokenizerFast], texts: Sequence[TaggedText], max_length: int, stride: int
) -> list[Windows]:
    """Return texts as windows of tokens, for each tokenizer; a window has the same words in all of them.

    A window is a run of words that fits for each tokenizer; of a word that is longer than a window the first tokens are
    there.

    Args:
        tokenizers: What encodes the words, each for itself; a space before one counts where there is one in the text.
        texts: The texts.
        max_length: Of a window, special tokens included.
        stride: The most tokens that two windows of a text share.

    Raises:
        ConfigError: Windows that do not get on.
    """
    rooms = [max_length - tokenizer.num_special_tokens_to_add() for tokenizer in tokenizers]
    if not 0 <= stride < min(rooms):
        raise ConfigError(
            f"data.stride={stride}: expected less than the {min(rooms)} tokens of a text that fit into "
            f"data.max_length={max_length}"
        )
    around = [around_text(tokenizer) for tokenizer in tokenizers]
    found: list[list[tuple[Ints, Ints]]] = [[] for _ in tokenizers]
    owners: list[int] = []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        for number, pieces in enumerate(zip(*(_pieces(one, chunk) for one in tokenizers), strict=True), start=start):
            runs = _runs([np.array([*map(len, words)]) for words in pieces], rooms, stride)
            counted = _counted(runs)
            owners += [number] * len(runs)
            for windows, words, room, special in zip(found, pieces, rooms, around, strict=True):
                windows += [_window(words, run, own, room, special) for run, own in zip(runs, counted, strict=True)]
    return [_stored(windows, owners) for windows in found]


Ints = NDArray[np.int32]


def _pieces(tokenizer: PreTrainedTokenizerFast, texts: Sequence[TaggedText]) -> list[list[list[int]]]:
    """Return the tokens of each word of each text; a word without any has the unknown token."""
    words = [_spaced(text) for text in texts]
    encoded: Any = tokenizer(
        words, is_split_into_words=True, add_special_tokens=False, return_attention_mask=False,
        return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    nothing: Any = tokenizer.convert_tokens_to_ids(
        str(tokenizer.unk_token or tokenizer.eos_token or tokenizer.pad_token)
    )
    found = []
    for text, one in zip(words, encoded.encodings, strict=True):
        pieces: list[list[int]] = [[] for _ in text]
        for token, word in zip(one.ids, one.word_ids, strict=True):
            pieces[word].append(token)
        found.append([piece or [nothing] for piece in pieces])
    return found


def _spaced(text: TaggedText) -> list[str]:
    """Return words with their leading spaces, which some tokenizers distinguish."""
    return [
        (" " if start and text.text[start - 1].isspace() else "") + text.text[start:stop] for start, stop in text.words
    ]


def _runs(counts: Sequence[NDArray[np.int64]], rooms: Sequence[int], stride: int) -> list[range]:
    """Return the words of each window of a text.

    Args:
        counts: Of each tokenizer how many tokens each word has, `(W,)`.
        rooms: Of each how many tokens fit.
        stride: The most that two windows share.

    >>> _runs([np.ones(10, int)], [6], 4)
    [range(0, 6), range(2, 8), range(4, 10)]
    """
    ends = [np.concatenate([[0], np.minimum(count, room).cumsum()]) for count, room in zip(counts, rooms, strict=True)]
    found, start, total = [], 0, len(counts[0])
    while True:
        fits = [np.searchsorted(end, end[start] + room, "right") - 1 for end, room in zip(ends, rooms, strict=True)]
        stop = int(min(fits))
        found.append(range(start, stop))
        if stop == total:
            return found
        shared = (np.searchsorted(end, end[stop] - stride) for end in ends)
        # Otherwise the next word would not fit behind what is shared, and the window would show nothing new.
        room_for_next = (np.searchsorted(end, end[stop + 1] - room) for end, room in zip(ends, rooms, strict=True))
        start = max(start + 1, *map(int, shared), *map(int, room_for_next))


def _counted(runs: Sequence[range]) -> list[set[int]]:
    """Return which words count in each window: a word where most words are on both of its sides."""
    best: dict[int, tuple[float, int]] = {}
    for number, run in enumerate(runs):
        for word in run:
            before = word - run.start if number else np.inf
            behind = run.stop - 1 - word if number < len(runs) - 1 else np.inf
            if (around := float(min(before, behind))) > best.get(word, (-1.0, 0))[0]:
                best[word] = (around, number)
    found: list[set[int]] = [set() for _ in runs]
    for word, (_, number) in best.items():
        found[number].add(word)
    return found


def _window(
    words: Sequence[list[int]], run: range, counted: set[int], room: int, around: tuple[list[int], list[int]]
) -> tuple[Ints, Ints]:
    """Return a window's tokens, and the word of each that counts, -1 for others."""
    before, behind = around
    tokens, owners = list(before), [-1] * len(before)
    for word in run:
        pieces = words[word][:room]
        tokens += pieces
        owners += [word if word in counted else -1] * len(pieces)
    return np.array(tokens + behind, np.int32), np.array(owners + [-1] * len(behind), np.int32)


def _stored(windows: Sequence[tuple[Ints, Ints]], texts: Sequence[int]) -> Windows:
    tokens, words = (np.concatenate(part) for part in zip(*windows, strict=True))
    offsets = np.cumsum([0, *(len(window) for window, _ in windows)])
    return Windows(tokens, offsets, words, np.array(texts, np.int64))


class WordDataset(FlatDataset):
    """A run of windows of tagged texts.

    Batches have `input_ids`, `attention_mask`, `labels` and `keep` `(B, L)`, `index` and `window_of` `(B,)`; where
    every token of a word counts also `begins` `(B, L)`, which of them is its first. Of a teacher's own tokens they have
    `teacher_input_ids`, `teacher_attention_mask` and `teacher_rows` `(B, L')`: where the words begin that count.

    Args:
        windows: Of all texts there are, by the prefix of their names in the batch.
        labels: The class of each token of a word, `(T,)` int64; of those that do not count it is not read.
        every_token: Whether every token of a word counts, and not its first alone.
        span: Which of the windows these are.
        padding: What batches are padded with, by prefix.
    """

    def __init__(
        self, windows: Mapping[str, Windows], labels: NDArray[np.int64], every_token: bool, span: range,
        padding: Mapping[str, int],
    ) -> None:  # fmt: skip
        own, begins = windows[""], windows[""].begins
        keep = own.words >= 0 if every_token else begins
        entries: dict[str, Entry] = {"labels": (np.where(keep, labels, IGNORE), IGNORE)}
        entries |= {"keep": (keep, False)} | ({"begins": (begins, False)} if every_token else {})
        of_prefix: dict[str, dict[str, Entry]] = {
            prefix: {"input_ids": (one.tokens.astype(np.int64), padding[prefix])}
            | ({"rows": (one.begins, False)} if prefix else entries)
            for prefix, one in windows.items()
        }
        offsets = {prefix: one.offsets for prefix, one in windows.items()}
        super().__init__(offsets, of_prefix, {"window_of": own.cut}, span)
