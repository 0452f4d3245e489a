"""Conversations as tokens, by a chat template, and which of the tokens count."""

from __future__ import annotations

import bisect
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.corpus.conversations import ASSISTANT, Conversation, Message
from kd_lightning.data.corpus.store import Encoded, widths_of
from kd_lightning.data.text.tokens import before_text, special_tokens, tokenizer_fingerprint
from kd_lightning.runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1
"""Goes up when the same conversation becomes other tokens, or others of them count."""

Turns = Literal["all", "last", "everything"]
"""Which tokens count: those of all assistant turns, of the last one, or every token."""

PLAIN = """\
{%- for message in messages %}
{{- message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}
{%- else %}
{{- message['content'] | trim }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'assistant\n' }}
{%- endif %}"""
"""The template `plain`, for tokenizers without chat tokens: the end-of-text token ends an assistant's turn.

Before it stands what the tokenizer puts before any text, such as a BOS.
"""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def template_of(tokenizer: PreTrainedTokenizerFast, name: str, given: str | None) -> str:
    """Return a chat template: the tokenizer's own, `plain`, that of a file, or the given text.

    Args:
        tokenizer: The tokenizer.
        name: The key that names it, and the name.
        given: `plain`, a file or a text; None for its own.

    Raises:
        ConfigError: There is none.
    """
    if given == "plain":
        if tokenizer.eos_token is None:
            raise ConfigError(f"data.chat_template=plain: {name} has no eos_token to end a turn with")
        before = "".join(map(str, tokenizer.convert_ids_to_tokens(before_text(tokenizer))))
        return f"{{{{- {json.dumps(before)} }}}}\n{PLAIN}" if before else PLAIN
    if given is not None and "{" in given:
        return given
    if given is not None:
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"data.chat_template={given!r}: expected 'plain', a template or a file with one ({error})"
            ) from error
    try:
        found: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"{name} has no chat template: set data.chat_template to a file with one, or to plain"
        ) from error
    return found


class _Rendered(NamedTuple):
    """A conversation as a template writes it.

    Attributes:
        text: All of it.
        spans: Where in it the assistant's turns begin and end, in characters, if the template marks them.
        prefixes: If it does not, the text up to each begin and each end.
        where: The place of the conversation.
    """

    text: str
    spans: Sequence[tuple[int, int]] | None
    prefixes: Sequence[str]
    where: str


class ChatEncoder:
    """Encodes conversations with a chat template, each in one block.

    The tokens that count are found by where the template puts the assistant's turns: between `{% generation %}` and
    `{% endgeneration %}`, or else from the end of the generation prompt to the end of the turn; for this, what it makes
    of the first messages must be how it begins for all. What ends a turn counts, white space after it does not.

    A conversation of more than `block_size` tokens loses its last messages, so that it ends with an assistant's turn
    that fits. Where not even the first one does, the turn is cut; without a token that counts, nothing is left.

    Args:
        tokenizer: The tokenizer.
        template: The chat template, in Jinja.
        turns: Which tokens count.
        block_size: The most tokens.
    """

    masks = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, turns: Turns, block_size: int) -> None:
        self.tokenizer, self.template, self.turns, self.block_size = tokenizer, template, turns, block_size
        self._cut: Counter[str] = Counter()

    @property
    def key(self) -> list[Any]:
        """The tokenizer, the template and the options."""
        names = self.tokenizer.special_tokens_map
        return [tokenizer_fingerprint(self.tokenizer), VERSION, self.template, self.turns, self.block_size, names]

    @property
    def note(self) -> str:
        """How many conversations were cut."""
        if not self._cut:
            return ""
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self._cut.items()))
        return f"conversations longer than data.block_size={self.block_size} tokens: {counts}"

    @cached_property
    def _special(self) -> NDArray[np.int64]:
        return special_tokens(self.tokenizer)

    def __call__(self, documents: Sequence[str]) -> list[Encoded]:
        """Return the tokens of `Conversation`s.

        Raises:
            DataError: The template refuses one, or writes its turns so that they cannot be found.
        """
        return [encoded for _, encoded in self.fitted(documents)]

    def fitted(self, documents: Sequence[str]) -> list[tuple[Conversation, Encoded]]:
        """Return `Conversation`s without the messages that are left out, and their tokens."""
        read = [(one, one.messages) for one in documents if isinstance(one, Conversation)]
        found = self._encoded([self._rendered(messages, one.where) for one, messages in read])
        fits = [len(one.ids) <= self.block_size for one in found]
        return [
            (one, encoded) if whole else self._shortened(messages, one.where)
            for (one, messages), encoded, whole in zip(read, found, fits, strict=True)
        ]

    def _shortened(self, messages: Sequence[Message], where: str) -> tuple[Conversation, Encoded]:
        def first(count: int) -> Encoded:
            return self._encoded([self._rendered(messages[:count], where)])[0]

        ends = [number for number, message in enumerate(messages, start=1) if message["role"] == ASSISTANT]
        fit = bisect.bisect_right(ends, self.block_size, key=lambda count: len(first(count).ids))
        if fit:
            self._cut["lost their last messages"] += 1
            return Conversation.of(messages[: ends[fit - 1]], where), first(ends[fit - 1])
        left = Conversation.of(messages[: ends[0]], where)
        ids, widths, everywhere = first(ends[0])
        assert everywhere is not None
        ids, widths, counted = ids[: self.block_size], widths[: self.block_size], everywhere[: self.block_size]
        if counted.any():
            self._cut["were cut within the first assistant turn"] += 1
            return left, Encoded(ids, widths, counted)
        self._cut["are left out, as their first assistant turn begins later"] += 1
        return left, Encoded(ids[:0], widths[:0], counted[:0])

    # -- text ---------------------------------------------------------------------------------------------------------

    def _text(self, messages: Sequence[Message], where: str, **options: Any) -> tuple[str, Any]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            given: dict[str, Any] = {**options, **self.tokenizer.special_tokens_map}
            rendered: Any = render_jinja_template([list(messages)], chat_template=self.template, **given)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{where}: the chat template refuses it: {reason[:200]}") from error
        texts, spans = rendered
        return texts[0], spans

    def _rendered(self, messages: Sequence[Message], where: str) -> _Rendered:
        marked = _MARKED.search(self.template) is not None
        if marked and self.turns != "everything":
            text, [spans] = self._text(messages, where, return_assistant_tokens_mask=True)
            return _Rendered(text, spans[-1:] if self.turns == "last" else spans, [], where)
        text, _ = self._text(messages, where)
        if self.turns == "everything":
            return _Rendered(text, [(0, len(text))], [], where)
        turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        prefixes = []
        for number in turns[-1:] if self.turns == "last" else turns:
            begin, _ = self._text(messages[:number], where, add_generation_prompt=True)
            end, _ = self._text(messages[: number + 1], where)
            bare = end.rstrip()
            content = str(messages[number].get("content", "")).rstrip()
            prefixes += [begin, end if bare.endswith(content) or len(bare) <= len(begin) else bare]
        return _Rendered(text, None, prefixes, where)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _encoded(self, rendered: Sequence[_Rendered]) -> list[Encoded]:
        texts = [text for one in rendered for text in (one.text, *one.prefixes)]
        tokens = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        rows = iter(zip(tokens["input_ids"], tokens["offset_mapping"], strict=True))
        found = []
        for one in rendered:
            ids, spans = next(rows)
            prefixes = [prefix for prefix, _ in itertools.islice(rows, len(one.prefixes))]
            places = np.array(spans, np.int64).reshape(-1, 2)
            counted = _by_spans(places, one.spans) if one.spans is not None else _by_prefixes(ids, prefixes, one.where)
            counted[:1] = False  # nothing predicts it
            if not counted.any():
                raise DataError(f"{one.where}: no token of an assistant's turn is left by the chat template")
            numbers = np.array(ids, np.int64)
            widths = np.where(np.isin(numbers, self._special), 0, widths_of(one.text, places[:, 1]))
            found.append(Encoded(numbers, widths, counted))
        return found


class TeacherChatEncoder(ChatEncoder):
    """Encodes what a student reads of conversations for a teacher, by its own tokenizer and template.

    Args:
        tokenizer: The teacher's.
        template: Its chat template.
        student: What encodes the same conversations for the student, and so says which messages are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, student: ChatEncoder) -> None:
        super().__init__(tokenizer, template, student.turns, sys.maxsize)
        self.student = student

    @property
    def key(self) -> list[Any]:
        """Those of both."""
        return [*super().key, *self.student.key]

    def __call__(self, documents: Sequence[str]) -> list[Encoded]:
        """Return the teacher's tokens."""
        return super().__call__([one for one, _ in self.student.fitted(documents)])


def _by_spans(places: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which tokens begin within spans of characters, `(L,)`.

    A tokenizer that trims white space off its tokens' places leaves none of a token of white space but its end.
    """
    start, stop = places[:, 0], places[:, 1]
    found = np.zeros(len(places), np.bool_)
    for begin, end in spans:
        found |= np.where(start == stop, (begin < stop) & (stop <= end), (begin <= start) & (start < end))
    return found


def _by_prefixes(ids: list[int], prefixes: Sequence[list[int]], where: str) -> NDArray[np.bool_]:
    """Return which tokens stand between each two of some beginnings of them, `(L,)`."""
    found = np.zeros(len(ids), np.bool_)
    for prefix in prefixes:
        if ids[: len(prefix)] != prefix:
            raise DataError(
                f"{where}: the chat template writes the first messages otherwise once there are more, so the "
                "assistant's tokens cannot be found; put {% generation %} and {% endgeneration %} around its turns "
                "(data.chat_template)"
            )
    for begin, end in zip(prefixes[::2], prefixes[1::2], strict=True):
        found[len(begin) : len(end)] = True
    return found
