"""Conversations of the user's own files: each record is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_lightning.data.corpus.documents import FileDocuments
from kd_lightning.data.labels import check_unicode
from kd_lightning.data.sources.records import Format
from kd_lightning.data.text.corpus import is_blank
from kd_lightning.runtime.errors import DataError, did_you_mean

Message = dict[str, Any]
"""`role` and `content`, and whatever else a chat template reads, such as `tool_calls`."""

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")


class Conversation(str):
    """A conversation: its messages as JSON, by which it is split, and where it was read."""

    __slots__ = ("where",)
    where: str

    @classmethod
    def of(cls, messages: Sequence[Message], where: str) -> Conversation:
        """Return the conversation of some messages."""
        made = cls(json.dumps(messages, ensure_ascii=False))
        made.where = where
        return made

    @property
    def messages(self) -> list[Message]:
        """Its messages."""
        found: list[Message] = json.loads(self)
        return found


@dataclass(frozen=True)
class ConversationReader(FileDocuments):
    """How the user's files of conversations are written: `messages`, or a prompt and its response.

    Attributes:
        messages_column: The key or column with the messages.
        prompt_column: That with a prompt, a text or the messages before the response, where no `messages` are.
        response_column: That with its response.
        role_key: In a message, the key of its role.
        content_key: The key of its text.
        roles: Roles by the names that the files have for them, such as `{"gpt": "assistant"}`.
    """

    messages_column: str = "messages"
    prompt_column: str = "prompt"
    response_column: str = "response"
    role_key: str = "role"
    content_key: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)
    format: Format | None = None
    encoding: str = "utf-8"

    @property
    def settings(self) -> list[Any]:
        """What decides the conversations of a file."""
        keys = [self.role_key, self.content_key, dict(self.roles)]
        return [self.messages_column, self.prompt_column, self.response_column, *keys, self.encoding]

    def documents(self, path: Path) -> Iterator[str]:
        """Yield the conversations of a file as they are read.

        Raises:
            DataError: Names the file and the place in it.
        """
        kind = self.kind(path)
        if kind == "txt":
            raise DataError(f"{path}: plain text has no roles; give JSON or Parquet with {self.messages_column!r}")
        return self.records(path, kind)

    def columns(self, names: Callable[[], Sequence[str]]) -> dict[str, str]:
        """Return the column of the messages, or those of prompt and response if there are only these."""
        pair, there = {"prompt_column": self.prompt_column, "response_column": self.response_column}, names()
        paired = self.messages_column not in there and set(pair.values()) <= set(there)
        return pair if paired else {"messages_column": self.messages_column}

    def document(self, record: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Conversation:
        """Return the conversation of a record.

        Raises:
            DataError: It has no assistant's turn, an unknown role or an empty content.
        """
        if "messages_column" in columns:
            given, place = record[self.messages_column], f"{where}, column {self.messages_column!r}"
        else:
            prompt, response = record[self.prompt_column], record[self.response_column]
            begin = [self._made("user", prompt)] if isinstance(prompt, str) or prompt is None else prompt
            place = f"{where}, columns {self.prompt_column!r} and {self.response_column!r}"
            given = [*begin, self._made(ASSISTANT, response)] if isinstance(begin, list) else begin
        if not isinstance(given, list) or not given:
            raise DataError(f"{place}: expected a list of messages, got {given!r:.60}")
        messages = [self._message(one, f"{place}: message {number}") for number, one in enumerate(given, start=1)]
        if not any(message["role"] == ASSISTANT for message in messages):
            raise DataError(f"{place}: there is no assistant's turn in it, so there is nothing to learn; remove it")
        return Conversation.of(messages, where)

    def _made(self, role: str, content: Any) -> Message:
        named = next((name for name, meant in self.roles.items() if meant == role), role)
        return {self.role_key: named, self.content_key: content}

    def _message(self, message: Any, where: str) -> Message:
        if not isinstance(message, dict):
            raise DataError(
                f"{where}: expected an object with {self.role_key!r} and {self.content_key!r}, got {message!r:.60}"
            )
        more = {name: value for name, value in message.items() if value is not None}
        role, content = more.pop(self.role_key, None), more.pop(self.content_key, None)
        role = self.roles.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            near = did_you_mean(str(role), ROLES)
            raise DataError(f"{where}: unknown role {role!r}{near} (data.roles maps names, data.role_key is the key)")
        where = f"{where} ({role})"
        if content is not None and not isinstance(content, str):
            raise DataError(f"{where}: expected a text as {self.content_key!r}, got the {type(content).__name__}")
        if content is None or is_blank(content):
            if role != ASSISTANT or not more.get("tool_calls"):
                raise DataError(f"{where}: the content is empty; fill it in or remove it (data.content_key is the key)")
            content = ""
        check_unicode(content, where)
        return {"role": role, "content": content, **more}
