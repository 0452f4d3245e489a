"""The user's own conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kd_lightning.data.corpus.chat import ChatEncoder, TeacherChatEncoder, Turns, template_of
from kd_lightning.data.corpus.conversations import ROLES, Conversation, ConversationReader
from kd_lightning.data.corpus.store import Source
from kd_lightning.data.sources.lm_text import OwnDocuments
from kd_lightning.data.sources.records import Format
from kd_lightning.runtime.assets import CHATTERBOT_FILES, fetch
from kd_lightning.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatData(OwnDocuments):
    """Conversations in JSON, Parquet, CSV or TSV files, or folders of them, for language models.

    Each record is one: a list of messages, or a prompt and its response. They become tokens by the tokenizer's chat
    template, and only assistant's turns count, in losses, scores and what is stored of a teacher
    (`kd_lightning.data.corpus.chat.ChatEncoder`). No conversation is cut at the end of a block.

    Args:
        train_file: A file or a folder, or several, of the conversations to train on.
        validation_file: Those to select on; None holds out some of the others.
        test_file: Those to report on; None holds out some of the others.
        turns: Which tokens count: those of `all` assistant turns, of the `last` one, or `everything`. A teacher with
            another tokenizer (`cross_tokenizer`) reads by its own template, and is compared within these turns alone.
        chat_template: A file with a chat template, or its text; `plain` for one that needs no chat tokens; by default
            the tokenizer's.
        messages_column: The key or column with the messages.
        prompt_column: That with a prompt, a text or messages, where there are no messages.
        response_column: That with its response.
        role_key: In a message, the key of its role.
        content_key: The key of its text.
        roles: Roles by the names that the files have for them, such as `{"gpt": "assistant"}`.
        packing: `documents`, conversations one after the other, of which none sees another; or `none`, one a block.
        format: The files' format; by default from the suffix.
        encoding: Of the text formats.
        options: Those of `OwnDocuments`.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self,
        train_file: str | Sequence[str] | None = None,
        validation_file: str | Sequence[str] | None = None,
        test_file: str | Sequence[str] | None = None,
        turns: Turns = "all",
        chat_template: str | None = None,
        messages_column: str = "messages",
        prompt_column: str = "prompt",
        response_column: str = "response",
        role_key: str = "role",
        content_key: str = "content",
        roles: Mapping[str, str] | None = None,
        packing: Literal["documents", "none"] = "documents",
        format: Format | None = None,
        encoding: str = "utf-8",
        **options: Any,
    ) -> None:
        reader = ConversationReader(
            messages_column, prompt_column, response_column, role_key, content_key, dict(roles or {}), format, encoding
        )
        super().__init__(train_file, validation_file, test_file, end_of_text=False, packing=packing, **options)
        self.reader = reader
        if self.masks is not None:
            raise ConfigError(
                f"data.mask_probability={self.masks.probability:g}: of conversations the next tokens are learned; set 0"
            )
        if self.packing == "concat":
            raise ConfigError("data.packing=concat: a conversation would see others; expected documents or none")
        if turns not in get_args(Turns):
            raise ConfigError(f"data.turns={turns!r} is unknown{did_you_mean(str(turns), get_args(Turns))}")
        if unknown := sorted(set(reader.roles.values()) - set(ROLES)):
            raise ConfigError(f"data.roles: {unknown[0]!r} is no role{did_you_mean(unknown[0], ROLES)}")
        if turns == "everything" and self.cross_tokenizer:
            raise ConfigError(
                "data.cross_tokenizer=true: student and teacher write conversations by other templates, of which the "
                "assistant's turns alone are the same text: set data.turns to all, or last"
            )
        self.turns: Turns = turns
        self.chat_template = chat_template

    def _learned_from(self, source: Source) -> Iterator[str]:
        for one in source.documents():
            if isinstance(one, Conversation):
                yield "\n".join(message["content"] for message in one.messages)

    def _encoder(self) -> ChatEncoder:
        template = template_of(self._tokenizer, f"data.tokenizer={self.tokenizer_name!r}", self.chat_template)
        self._tokenizer.chat_template = template  # it is saved with the run
        return ChatEncoder(self._tokenizer, template, self.turns, self.block_size)

    def _encoder_of(self, tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
        """Return what turns conversations into tokens of a teacher, by its own template if it has one."""
        name = f"data.teacher_tokenizer={self.teacher_tokenizer_name!r}"
        own = None if tokenizer.chat_template else self.chat_template
        return TeacherChatEncoder(tokenizer, template_of(tokenizer, name, own), self._encoder())


class Chatterbot(ChatData):
    """The 2,000 short English conversations of PyPI's chatterbot-corpus, some of which begin alike.

    Args:
        folder: Where `conversations.jsonl` is; by default fetched from PyPI.
        options: Those of `ChatData`.
    """

    def __init__(self, folder: str | None = None, **options: Any) -> None:
        super().__init__(train_file=CHATTERBOT_FILES[0], **options)
        self.folder = folder

    def sources(self) -> Mapping[str, Source]:
        """Return the conversations, of which some are held out."""
        place = Path(self.folder).expanduser() if self.folder else fetch("chatterbot")
        self.files = {"train": [str(place / CHATTERBOT_FILES[0])]}
        return super().sources()
