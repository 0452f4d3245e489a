"""Tagged words as tokens: which token begins which word, in windows that overlap where a text is long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.data.text.tagged import TaggedText
from kd_lightning.data.text.tokens import CHUNK, padded
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


VERSION = 1
"""Goes up when texts become other windows, or other words count in them."""


@dataclass(frozen=True)
class Windows:
    """Texts as tokens, one after the other in flat arrays; a long text in several windows that overlap.

    A word counts in one window only: in that where it has most tokens on both sides.

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
    """Return texts as windows of tokens.

    Args:
        tokenizer: What encodes the words, each for itself; a space before it counts where there is one in the text.
        texts: The texts.
        max_length: Of a window, special tokens included.
        stride: How many tokens two windows of a text share.

    Raises:
        ConfigError: Windows that do not get on.
    """
    room = max_length - tokenizer.num_special_tokens_to_add()
    if not 0 <= stride < room:
        raise ConfigError(
            f"data.stride={stride}: expected less than the {room} tokens of a text that fit into "
            f"data.max_length={max_length}"
        )
    tokens: list[Any] = []
    words: list[Any] = []
    owners: list[NDArray[np.int64]] = []
    for start in range(0, len(texts), CHUNK):
        for encoded in _encoded(tokenizer, texts[start : start + CHUNK], max_length, stride):
            owners.append(np.full(len(encoded), start + int(encoded[0][2]), np.int64))
            numbers = [np.array([-1 if word is None else word for word in found], np.int32) for _, found, _ in encoded]
            words += _counted_once(numbers, room - stride)
            tokens += [ids for ids, _, _ in encoded]
    offsets = np.cumsum([0, *map(len, tokens)])
    flat = np.concatenate([np.asarray(ids, np.int32) for ids in tokens])
    return Windows(flat, offsets, np.concatenate(words), np.concatenate(owners))


Window = tuple[list[int], list[int | None], int]
"""Tokens, the word that each is of, and the number of the text."""


def _encoded(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[TaggedText], max_length: int, stride: int
) -> list[list[Window]]:
    """Return the windows of each text; a word without any token becomes the unknown token."""
    words = [_spaced(text) for text in texts]
    found = _windows(tokenizer, words, max_length, stride)
    nothing = str(tokenizer.unk_token or tokenizer.eos_token or tokenizer.pad_token)
    for i, windows in enumerate(found):
        seen = {word for _, numbers, _ in windows for word in numbers}
        if len(seen - {None}) < len(words[i]):
            readable = [word if number in seen else nothing for number, word in enumerate(words[i])]
            found[i] = [(*window[:2], i) for window in _windows(tokenizer, [readable], max_length, stride)[0]]
    return found


def _windows(
    tokenizer: PreTrainedTokenizerFast, words: list[list[str]], max_length: int, stride: int
) -> list[list[Window]]:
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        encoded: Any = tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=max_length, stride=stride,
            return_overflowing_tokens=True, return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
    finally:
        tokenizer.truncation_side = side
    found: list[list[Window]] = [[] for _ in words]
    for text, window in zip(encoded["overflow_to_sample_mapping"], encoded.encodings, strict=True):
        found[text].append((window.ids, window.word_ids, text))
    return found


def _spaced(text: TaggedText) -> list[str]:
    """Return words with their leading spaces, which some tokenizers distinguish."""
    return [
        (" " if start and text.text[start - 1].isspace() else "") + text.text[start:stop] for start, stop in text.words
    ]


def _counted_once(windows: list[NDArray[np.int32]], step: int) -> list[NDArray[np.int32]]:
    """Return the words of a text's windows, each left in one of them and -1 in the others.

    Args:
        windows: Of each window the word that each of its tokens is of, -1 for special tokens.
        step: From the first token of a window to that of the next one, special tokens left aside.
    """
    if len(windows) == 1:
        return windows
    first: dict[int, int] = {}  # where each word begins, counted through the text
    for number, words in enumerate(windows):
        for place, word in enumerate(words[words >= 0].tolist(), start=number * step):
            first[word] = min(place, first.get(word, place))
    owner: dict[int, tuple[float, int]] = {}  # how much stands around it in its window, and which that is
    for number, words in enumerate(windows):
        start, size = number * step, int((words >= 0).sum())
        for word in set(words[words >= 0].tolist()):
            before = first[word] - start if number else np.inf
            behind = start + size - 1 - first[word] if number < len(windows) - 1 else np.inf
            if before >= 0 and (around := float(min(before, behind))) > owner.get(word, (-1.0, 0))[0]:
                owner[word] = (around, number)
    return [
        np.array([word if owner.get(word, (0, -1))[1] == number else -1 for word in words.tolist()], np.int32)
        for number, words in enumerate(windows)
    ]


class WordDataset(BatchDataset):
    """A run of windows of tagged texts.

    Batches have `input_ids`, `attention_mask`, `labels` and `keep` `(B, L)`, `index` and `window_of` `(B,)`; where
    every token of a word counts also `begins` `(B, L)`, which of them is its first.

    Args:
        windows: Of all texts there are.
        labels: The class of each token of a word, `(T,)` int64; of those that do not count it is not read.
        every_token: Whether every token of a word counts, and not its first alone.
        span: Which of the windows these are.
        pad_token_id: What batches are padded with.
    """

    def __init__(
        self, windows: Windows, labels: NDArray[np.int64], every_token: bool, span: range, pad_token_id: int
    ) -> None:
        self.windows, self.span, self.cut = windows, span, windows.cut
        begins = windows.begins
        keep = windows.words >= 0 if every_token else begins
        self.entries: dict[str, tuple[NDArray[Any], int]] = {
            "input_ids": (windows.tokens, pad_token_id), "labels": (np.where(keep, labels, IGNORE), IGNORE),
            "keep": (keep, False),
        }  # fmt: skip
        if every_token:
            self.entries["begins"] = (begins, False)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each window, `(len(self),)`."""
        return self.windows.lengths[self.span.start : self.span.stop]

    def _turn(self, epoch: int) -> Turn:
        return np.arange(len(self)), self.lengths

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        index = np.asarray(positions, np.int64) + self.span.start
        place, mask = padded(self.windows.offsets, index)
        batch = {name: np.where(mask, flat[place], fill) for name, (flat, fill) in self.entries.items()}
        batch |= {"attention_mask": mask.astype(np.int64), "index": index, "window_of": self.cut[index]}
        batch["input_ids"] = batch["input_ids"].astype(np.int64)
        return {name: torch.from_numpy(entry) for name, entry in batch.items()}
