"""The tokens that a text has at its masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.tasks.token_scores import TokenFidelity, TokenScores, entropy
from kd_lightning.types import Batch

NAME = "masked token of "
MOST_SHOWN = 5
"""Of a mask's likeliest tokens."""


class MaskedLanguageModeling(Task):
    """The masked tokens of a text, from those on both sides (Devlin et al. 2018, arXiv 1810.04805).

    A batch states where they are, in `masked_places` `(B, M)`. Logits are of these places alone, `(B, M, V)`, and so
    are `labels`, `keep` and `of_document`: no tensor has a row of V numbers for each token of a text.

    Args:
        vocabulary: V, how many tokens there are.
    """

    monitor, unit, learns_from, fills = "cross_entropy", "document", "text", True
    specs: Mapping[str, ScoreSpec] = {
        "cross_entropy": ScoreSpec("cross-entropy of a masked token, nats", "min", shown="always", across=False),
        "perplexity": ScoreSpec("perplexity", "min", exp_of="cross_entropy", across=False),
        "accuracy": ScoreSpec("tokens predicted first", across=False),
        "agreement": ScoreSpec("agreement with teacher"),
        "agreement_top5": ScoreSpec("teacher's first among first 5"),
        "kl_to_teacher": ScoreSpec("KL to teacher, nats a token", "min"),
    }

    def __init__(self, vocabulary: int) -> None:
        self.outputs = self.classes = vocabulary

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and V."""
        return {"_target_": "kd_lightning.tasks.MaskedLanguageModeling", "vocabulary": self.outputs}

    def check_logits(self, logits: Tensor, batch: Batch) -> None:
        """Refuse logits that are not `(B, M, V)`."""
        shape = [*batch["masked_places"].shape, self.outputs]
        if list(logits.shape) != shape:
            raise ConfigError(
                f"it predicts logits of shape {list(logits.shape)} at the masked tokens, and these data need {shape}: "
                "use model@student=masked_lm_small, masked_lm or another with logits (B, L, V) for a text"
            )

    def finished(self, checkpoint: str, sizes: Mapping[str, int]) -> nn.Module:
        """Load a masked language model of Hugging Face; a head that it lacks is drawn alike every time."""
        from kd_lightning.models.masked_lm import masked_lm  # imports the models of transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return masked_lm(checkpoint, sizes.get("vocab_size", self.outputs), sizes.get("block_size"))

    def pipeline(self, reads: str) -> str:
        """Return the hub's name."""
        return "fill-mask"

    def loss(self) -> Term:
        """Return the cross-entropy."""
        return CrossEntropyLoss()

    def scores(self) -> Scores:
        """Return the mean cross-entropy of a masked token, its power of e, and how many are predicted first."""
        return TokenScores(("cross_entropy", "perplexity", "accuracy"))

    def fidelity(self) -> Scores:
        """Return agreement with the teacher, and the divergence from it, over masked tokens."""
        return TokenFidelity()

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the tokens' probabilities."""
        return logits.softmax(-1)

    def read(self, logits: Tensor, rows: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the likeliest tokens at each mask of each text, by their numbers."""
        found = []
        for row, keep in zip(logits, rows["keep"], strict=True):
            refuse_nan(row[keep])
            chances, ids = row[keep].softmax(-1).topk(min(MOST_SHOWN, row.shape[-1]))
            masks = zip(ids.tolist(), chances.tolist(), strict=True)
            found.append({"masks": [{"tokens": tokens, "probabilities": of_each} for tokens, of_each in masks]})
        return found

    def cells(self, record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, str]:
        """Return each mask's likeliest tokens with their probabilities, a column a mask."""
        return {
            f"mask {number}": ", ".join(
                f"{token} {chance:.3f}" for token, chance in zip(mask["tokens"], mask["probabilities"], strict=True)
            )
            for number, mask in enumerate(record["masks"], start=1)
        }

    @property
    def description(self) -> str:
        """Its name and V."""
        return f"{NAME}{self.outputs}"

    def columns(self, names: Sequence[str]) -> str:
        """Return that they are the vocabulary's."""
        return "`logits` has a row for each token and a column for each token that may stand there; read it at masks."

    def limits(self, names: Sequence[str]) -> str:
        """Return that it fills in what its texts would have."""
        return "It fills in what its training texts would have there, true or not."

    def chance_score(self, labels: Tensor) -> float:
        """Return the cross-entropy of the tokens' own frequencies."""
        return entropy(labels)

    @classmethod
    def described(cls, description: str) -> MaskedLanguageModeling | None:
        """Return the task of a `description`; None where it describes another."""
        return cls(int(description.removeprefix(NAME))) if description.startswith(NAME) else None
