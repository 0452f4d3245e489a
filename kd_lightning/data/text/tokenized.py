"""What all data of texts share: the tokenizers of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from kd_lightning.data.datamodule import IndexedData, Role
from kd_lightning.data.options import check_least
from kd_lightning.data.text.tokens import load_tokenizer, tokenizer_fingerprint
from kd_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES: tuple[Role, Role] = ("student", "teacher")


class TokenizedData(IndexedData):
    """Texts that a student and a teacher read as tokens, each with its own tokenizer or both with one.

    Args:
        tokenizer: `"minilm"`, a folder, a Hugging Face name, or `"wordpiece:8000"` to learn one from the data.
        teacher_tokenizer: The teacher's, where it differs.
        max_length: The longest input in tokens.
        options: Those of `IndexedData`.

    Raises:
        ConfigError: An option out of its range.
    """

    def __init__(
        self, tokenizer: str = "minilm", teacher_tokenizer: str | None = None, max_length: int = 64, **options: Any
    ) -> None:
        super().__init__(**options)
        check_least(4, max_length=max_length)
        self.tokenizer_names = {"student": tokenizer, "teacher": teacher_tokenizer or tokenizer}
        self.max_length = max_length
        self._stores: dict[Role, Any]  # the encoded texts; set by `prepare`
        self._readings: dict[str, Self] = {}  # the same data for other teachers, by their tokenizers

    def _load_tokenizers(self, training_texts: list[str]) -> dict[str, PreTrainedTokenizerFast]:
        """Load the tokenizers, or learn them from these texts; return them by their names in the options."""
        names = self.tokenizer_names
        loaded = {name: load_tokenizer(name, training_texts) for name in sorted(set(names.values()))}
        self.student_tokenizer: PreTrainedTokenizerFast = loaded[names["student"]]
        self.teacher_tokenizer: PreTrainedTokenizerFast = loaded[names["teacher"]]
        if len({tokenizer_fingerprint(tokenizer) for tokenizer in loaded.values()}) == 1:
            self.tokenizer_names = dict.fromkeys(ROLES, names["student"])  # the same by two names
        for name, tokenizer in loaded.items():
            if self.max_length > tokenizer.model_max_length:
                longest = tokenizer.model_max_length
                raise ConfigError(f"data.max_length={self.max_length}, but {name!r} takes at most {longest} tokens")
        return loaded

    @property
    def has_two_tokenizers(self) -> bool:
        """Whether the teacher's tokens differ from the student's."""
        return self.tokenizer_names["student"] != self.tokenizer_names["teacher"]

    def model_arguments(self, role: Role) -> dict[str, Any]:
        """Return a network's arguments from the data: `num_classes`, `vocab_size` and `pad_token_id`."""
        self.prepare()
        tokenizer = self.tokenizer_of(role)
        return {
            "num_classes": len(self.class_names),
            "vocab_size": len(tokenizer),
            "pad_token_id": int(tokenizer.pad_token_id),
        }

    def tokenizer_of(self, role: Role) -> PreTrainedTokenizerFast:
        """Return the tokenizer of a network's inputs."""
        return self.student_tokenizer if role == "student" else self.teacher_tokenizer

    def read_with(self, tokenizers: Mapping[Role, str]) -> None:
        """Use tokenizers from these folders; without a separate teacher tokenizer, one serves both."""
        either = next(iter(tokenizers.values())) if tokenizers and not self.has_two_tokenizers else None
        names = self.tokenizer_names
        self.tokenizer_names = {role: either or tokenizers.get(role, names[role]) for role in ROLES}

    def reading(self, tokenizer: str) -> Self:
        """Return the same data for a teacher with another tokenizer; itself if it already has it.

        Args:
            tokenizer: A folder or a Hugging Face name.
        """
        self.prepare()
        fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer, []))
        if fingerprint == self.teacher_key["tokenizer"]:
            return self
        if fingerprint not in self._readings:
            other = self._copy()
            other.tokenizer_names = {**self.tokenizer_names, "teacher": tokenizer}
            other.fingerprint, other._readings = "", {}
            other.prepare()
            self._readings[fingerprint] = other
        return self._readings[fingerprint].select(self._tokens, self._pool)

    def with_one_reader(self) -> Self:
        """Return the same data for a teacher with the student's tokens."""
        chosen = self._copy()
        tokenizer = chosen.teacher_tokenizer = self.student_tokenizer
        chosen.tokenizer_names = dict.fromkeys(ROLES, self.tokenizer_names["student"])
        chosen._stores = dict.fromkeys(ROLES, self._stores["student"])
        own = {"tokenizer": tokenizer_fingerprint(tokenizer), "truncation": tokenizer.truncation_side}
        chosen.teacher_key = self.teacher_key | {name: own[name] for name in own.keys() & self.teacher_key.keys()}
        return chosen

    def _readers(self) -> dict[str, Role]:
        """Return the token stores of a batch by the prefix of their names."""
        if self._tokens == "both" and self.has_two_tokenizers:
            return {"": "student", "teacher_": "teacher"}
        return {"": "teacher" if self._tokens == "teacher" else "student"}
