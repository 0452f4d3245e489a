"""Texts that a language model generated, as tokens: kept as it drew them, never tokenised again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_lightning.data.corpus.store import Encoded
from kd_lightning.data.text.tokens import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def written(prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return a prompt and what was generated after it as a document."""
    return json.dumps([len(prompt), [*prompt, *new]])


@dataclass(frozen=True)
class GeneratedEncoder:
    """Reads documents of `written`: of their tokens those count that were generated.

    Attributes:
        tokenizer: Whose tokens they are. How many bytes each stands for is not known: 0.
    """

    tokenizer: PreTrainedTokenizerFast
    masks = True
    note = ""

    @property
    def key(self) -> list[Any]:
        """The tokenizer, and that the texts are generated."""
        return [tokenizer_fingerprint(self.tokenizer), "generated"]

    def __call__(self, documents: Sequence[str]) -> list[Encoded]:
        """Return each document's tokens."""
        found = []
        for prompt, ids in map(json.loads, documents):
            tokens = np.array(ids, np.int64)
            found.append(Encoded(tokens, np.zeros_like(tokens), np.arange(len(tokens)) >= prompt))
        return found
