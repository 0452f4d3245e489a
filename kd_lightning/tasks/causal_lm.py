"""The next token of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.tasks.token_scores import TokenFidelity, TokenScores, documents_of, entropy
from kd_lightning.types import Batch

MOST_SHOWN = 5
"""Of the likeliest next tokens."""
AFTER = {"1-16": (1, 16), "17-64": (17, 64), "65-256": (65, 256), "257-1024": (257, 1024), "1025+": (1025, math.inf)}
"""Ranges of places in a text: how many tokens the network has read that predicts the next one."""


class Kept(NamedTuple):
    """The tokens of a trimmed vocabulary.

    Attributes:
        ids: Each token's number in the whole vocabulary.
        size: How many tokens that has.
    """

    ids: tuple[int, ...]
    size: int


class CausalLanguageModeling(Task):
    """The token after each token of a text, from those before it.

    Args:
        vocabulary: V, how many tokens there are.
        kept: Which tokens of a checkpoint of Hugging Face these are; None: all.
    """

    monitor, unit, learns_from, generates = "cross_entropy", "document", "text", True
    specs: Mapping[str, ScoreSpec] = {
        "cross_entropy": ScoreSpec("cross-entropy of a token, nats", "min", shown="always", across=False),
        "perplexity": ScoreSpec("perplexity", "min", exp_of="cross_entropy", across=False),
        "bits_per_byte": ScoreSpec("bits per byte", "min"),
        "accuracy": ScoreSpec("tokens predicted first", across=False),
        "agreement": ScoreSpec("agreement with teacher"),
        "agreement_top5": ScoreSpec("teacher's first among first 5"),
        "kl_to_teacher": ScoreSpec("KL to teacher, nats a token", "min"),
        **{f"kl_to_teacher/{n}": ScoreSpec(f"KL to teacher after {n} tokens", "min", shown="apart") for n in AFTER},
    }

    def __init__(self, vocabulary: int, kept: Kept | None = None) -> None:
        self.outputs = self.classes = vocabulary
        self.kept = kept

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and V."""
        return {"_target_": "kd_lightning.tasks.CausalLanguageModeling", "vocabulary": self.outputs}

    def compared(self, batch: Batch) -> Batch:
        """Return the batch with each token's label, and its bytes, at the row that predicts it."""
        rows = next_tokens(batch)
        if "token_bytes" in batch:
            rows["token_bytes"] = F.pad(batch["token_bytes"][:, 1:], (0, 1))
        return rows

    def check_logits(self, logits: Tensor, batch: Batch) -> None:
        """Refuse logits that are not `(B, L, V)`; of a network that leaves them out of training `(B, L, 0)`."""
        shape = [*batch["input_ids"].shape, self.outputs]
        if list(logits.shape) not in (shape, [*shape[:2], 0]):
            raise ConfigError(
                f"it predicts logits of shape {list(logits.shape)}, and a language model of these data {shape}: "
                "use model@student=causal_lm_small, causal_lm or another with a row of logits for each token"
            )

    def finished(self, checkpoint: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load a causal language model of Hugging Face."""
        from kd_lightning.models.causal_lm import causal_lm, trimmed  # imports the models of transformers

        tokens = sizes.get("vocab_size", self.outputs)  # of another tokenizer these are the teacher's
        if self.kept is None or tokens != self.outputs:
            return causal_lm(checkpoint, tokens, sizes.get("block_size"))
        return trimmed(causal_lm(checkpoint, self.kept.size, sizes.get("block_size")), self.kept.ids)

    def pipeline(self, reads: str) -> str:
        """Return the hub's name."""
        return "text-generation"

    def loss(self) -> Term:
        """Return the cross-entropy."""
        return CrossEntropyLoss()

    def scores(self) -> Scores:
        """Return the mean cross-entropy of a token and what follows from it, and how many are predicted first."""
        return TokenScores(("cross_entropy", "perplexity", "accuracy", "bits_per_byte"))

    def fidelity(self) -> Scores:
        """Return agreement and divergence, the latter also by ranges of places in a document (`AFTER`)."""
        return TokenFidelity(AFTER)

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the tokens' probabilities."""
        return logits.softmax(-1)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the likeliest tokens after each text, by their numbers."""
        lengths = (
            rows["attention_mask"].sum(1) if "attention_mask" in rows else torch.full((len(logits),), logits.shape[1])
        )
        last = logits[torch.arange(len(logits)), lengths - 1]
        refuse_nan(last)
        found, ids = last.softmax(-1).topk(min(MOST_SHOWN, last.shape[-1]))
        return [
            {"tokens": tokens, "probabilities": chances}
            for tokens, chances in zip(ids.tolist(), found.tolist(), strict=True)
        ]

    def prompts(self, batch: Batch, tokens: int, every: bool = False) -> list[Tensor]:
        """Return how each document of a batch begins, up to its half; or all before what counts."""
        rows, found = self.compared(batch), []
        numbers = torch.where(batch.get("attention_mask", rows["keep"]) > 0, documents_of(rows), -1)
        for ids, row, keep in zip(batch["input_ids"], numbers, rows["keep"], strict=True):
            for number in torch.unique_consecutive(row[row >= 0]):
                here, counts = ids[row == number], keep[row == number].nonzero()[:, 0]
                if len(counts) and "keep" in batch:
                    begun = counts[counts.diff(prepend=counts[:1] - 2) > 1] if every else counts[:1]
                    found += [here[: int(end) + 1] for end in begun]
                elif len(counts):
                    found.append(here[: min(tokens, len(here) // 2)])
        return found

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return the likeliest token and its probability."""
        return {"token": str(record["tokens"][0]), "p": f"{record['probabilities'][0]:.3f}"}

    @property
    def description(self) -> str:
        """Its name and V."""
        return f"{NAME}{self.outputs}"

    def columns(self, names: Sequence[str]) -> str:
        """Return that they are the vocabulary's."""
        return "`logits` has a row for each token and a column for each token that may follow it."

    def limits(self, names: Sequence[str]) -> str:
        """Return that it makes things up."""
        return "It goes on with a text as its training texts would, true or not."

    def chance_score(self, labels: Tensor) -> float:
        """Return the cross-entropy of the tokens' own frequencies."""
        return entropy(labels)

    @classmethod
    def described(cls, description: str) -> CausalLanguageModeling | None:
        """Return the task of a `description`; None where it describes another."""
        return cls(int(description.removeprefix(NAME))) if description.startswith(NAME) else None


NAME = "next token of "
