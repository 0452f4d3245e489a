"""Questions and their contexts as windows of tokens: all of the question, and a part of the context."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.text.flat import Entry, FlatDataset
from kd_lightning.data.text.questions import Answer, Question
from kd_lightning.data.text.tokens import CHUNK, before_text
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.types import END, IGNORE, START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

VERSION = 2
"""Goes up when questions become other windows, or other tokens count in them."""


@dataclass(frozen=True)
class QuestionWindows:
    """Questions with their contexts as tokens, one window after the other in flat arrays.

    Attributes:
        tokens: Of all windows, `(T,)` int32.
        types: Which of the two texts each token is of, `(T,)` int8; None where the tokenizer does not tell networks.
        inside: Which tokens are the context's, `(T,)`.
        chars: Where these begin and end in the context, `(T, 2)` int32; zeros at others.
        offsets: Where each window begins and the last one ends, `(N + 1,)` int64.
        questions: The number of the question that each window is of, `(N,)` int64.
    """

    tokens: NDArray[np.int32]
    types: NDArray[np.int8] | None
    inside: NDArray[np.bool_]
    chars: NDArray[np.int32]
    offsets: NDArray[np.int64]
    questions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each window, `(N,)`."""
        return np.diff(self.offsets)

    @property
    def keep(self) -> NDArray[np.bool_]:
        """Which tokens count: those of the context, and the first of each window, which stands for no answer."""
        found = self.inside.copy()
        found[self.offsets[:-1]] = True
        return found

    def dataset(self, labels: NDArray[np.int64], span: range, padding: int) -> FlatDataset:
        """Return a run of the windows as batches, with `question` `(B,)`, `labels` and `keep` `(B, L)`."""
        entries: dict[str, Entry] = {"input_ids": (self.tokens.astype(np.int64), padding)}
        if self.types is not None:
            entries["token_type_ids"] = (self.types.astype(np.int64), 0)
        entries |= {"labels": (labels, IGNORE), "keep": (self.keep, False)}
        return FlatDataset({"": self.offsets}, {"": entries}, {"question": self.questions}, span)


def encode_questions(
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    max_length: int,
    max_question_length: int,
    stride: int,
) -> QuestionWindows:
    """Return questions with their contexts as windows of tokens.

    Args:
        tokenizer: It puts a special token before a text, which stands for no answer.
        pairs: Questions and contexts.
        max_length: Of a window, special tokens included.
        max_question_length: Longer questions are cut to so many tokens, which is logged.
        stride: How many tokens of the context two windows share.

    Raises:
        ConfigError: Windows that do not get on, or a tokenizer without such a token.
    """
    if not before_text(tokenizer):
        raise ConfigError(
            "data.tokenizer puts no special token before a text, and the first token stands for no answer: choose one "
            "that does, as those of BERT and RoBERTa"
        )
    tokenizer.truncation_side = "right"  # windows go through a context from its beginning
    room = max_length - max_question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= stride < room:
        raise ConfigError(
            f"data.stride={stride}: expected less than the {max(room, 0)} tokens of a context that fit into "
            f"data.max_length={max_length} beside a question of data.max_question_length={max_question_length}"
        )
    columns: list[list[NDArray[Any]]] = [[] for _ in range(4)]
    owners: list[int] = []
    cut = 0
    for begin in range(0, len(pairs), CHUNK):
        chunk = pairs[begin : begin + CHUNK]
        questions = _shortened(tokenizer, [question for question, _ in chunk], max_question_length)
        cut += sum(one != question for one, (question, _) in zip(questions, chunk, strict=True))
        encoded: Any = tokenizer(
            questions, [context for _, context in chunk], truncation="only_second", max_length=max_length,
            stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        owners += [begin + number for number in encoded["overflow_to_sample_mapping"]]
        for window in encoded.encodings:
            inside = np.array([one == 1 for one in window.sequence_ids], bool)
            chars = np.where(inside[:, None], np.array(window.offsets, np.int32).reshape(-1, 2), 0)
            ids, types = np.array(window.ids, np.int32), np.array(window.type_ids, np.int8)
            entries: list[NDArray[Any]] = [ids, types, inside, chars]
            for column, entry in zip(columns, entries, strict=True):
                column.append(entry)
    if cut:
        log.warning("cut %d of %d questions to %d tokens (max_question_length)", cut, len(pairs),
                    max_question_length)  # fmt: skip
    offsets = np.cumsum([0, *map(len, columns[0])])
    tokens, segments, inside, chars = (np.concatenate(column) for column in columns)
    typed = "token_type_ids" in tokenizer.model_input_names
    return QuestionWindows(tokens, segments if typed else None, inside, chars, offsets, np.array(owners, np.int64))


def _shortened(tokenizer: PreTrainedTokenizerFast, questions: list[str], most: int) -> list[str]:
    """Return as much of each question as has so many tokens."""
    encoded: Any = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = encoded["offset_mapping"]
    return [
        text if len(own) <= most else _cut(tokenizer, text, own, most)
        for text, own in zip(questions, places, strict=True)
    ]


def _cut(tokenizer: PreTrainedTokenizerFast, text: str, places: Sequence[tuple[int, int]], most: int) -> str:
    """Return the longest beginning of so many tokens that ends between two characters."""
    for kept in range(most, 0, -1):
        begin = text[: places[kept - 1][1]]
        encoded: Any = tokenizer(begin, add_special_tokens=False)
        if places[kept - 1][1] <= places[kept][0] and len(encoded["input_ids"]) <= most:
            return begin
    return ""


def span_labels_of(windows: QuestionWindows, questions: Sequence[Question]) -> NDArray[np.int64]:
    """Return each token's label `(T,)`: 1 where the answer starts, 2 where it ends, 3 for both, or 0.

    A window that does not have all of an answer has none, which its first token stands for; of several answers that it
    has the first counts. Tokens that do not count have `IGNORE`, and so have those of questions without known answers.

    Raises:
        DataError: An answer is whole in no window, or has no token.
    """
    labels = np.where(windows.keep, 0, IGNORE).astype(np.int64)
    bounds = np.searchsorted(windows.questions, np.arange(len(questions) + 1))
    for number, question in enumerate(questions):
        first, last = windows.offsets[bounds[number]], windows.offsets[bounds[number + 1]]
        if question.answers is None:
            labels[first:last] = IGNORE
            continue
        spans = [_span(windows, range(bounds[number], bounds[number + 1]), one, question) for one in question.answers]
        for window in range(bounds[number], bounds[number + 1]):
            here = (found[window] for found in spans if window in found)
            start, end = next(here, (windows.offsets[window],) * 2)
            labels[start] |= START
            labels[end] |= END
    return labels


def _span(windows: QuestionWindows, numbers: range, answer: Answer, question: Question) -> dict[int, tuple[int, int]]:
    """Return an answer's first and last token in each window that has all of it."""
    begin = windows.offsets[numbers.start]
    tokens = slice(begin, windows.offsets[numbers.stop])
    chars = windows.chars[tokens]
    within = windows.inside[tokens] & (chars[:, 1] > answer.start) & (chars[:, 0] < answer.stop)
    what = f"{question.place}: the answer {answer.text[:60]!r}"
    if not within.any():
        raise DataError(f"{what} has no token: it is of characters that the tokenizer drops; remove it")
    starts = within & (chars[:, 0] == chars[within, 0].min())
    ends = within & (chars[:, 1] == chars[within, 1].max())
    found = {}
    for window in numbers:
        own = slice(windows.offsets[window] - begin, windows.offsets[window + 1] - begin)
        if starts[own].any() and ends[own].any():
            places = starts[own].argmax(), np.flatnonzero(ends[own])[-1]
            found[window] = tuple(int(windows.offsets[window] + place) for place in places)
    if not found:
        raise DataError(f"{what} is cut by every window of its context: raise data.stride or data.max_length")
    return found  # type: ignore[return-value]
