"""The next token of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.sparse import bucketed, expected_kl, teacher_buckets
from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.metrics import Agreement, Mean, TeacherStudentKL
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.tasks.scores import Scores, ScoreSpec
from kd_lightning.types import Batch, SparseLogits

MOST_SHOWN = 5
"""Of the likeliest next tokens."""


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

    monitor, generates = "cross_entropy", True
    specs: Mapping[str, ScoreSpec] = {
        "cross_entropy": ScoreSpec("cross-entropy of a token, nats", "min", shown="always"),
        "perplexity": ScoreSpec("perplexity", "min"),
        "bits_per_byte": ScoreSpec("bits per byte", "min"),
        "accuracy": ScoreSpec("tokens predicted first"),
        "agreement": ScoreSpec("agreement with teacher"),
        "kl_to_teacher": ScoreSpec("KL to teacher, nats a token", "min"),
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

        if self.kept is None:
            return causal_lm(checkpoint, self.outputs, sizes.get("block_size"))
        return trimmed(causal_lm(checkpoint, self.kept.size, sizes.get("block_size")), self.kept.ids)

    def pipeline(self, reads: str) -> str:
        """Return the hub's name."""
        return "text-generation"

    def loss(self) -> Term:
        """Return the cross-entropy."""
        return CrossEntropyLoss()

    def scores(self) -> Scores:
        """Return the mean cross-entropy of a token and what follows from it, and how many are predicted first."""
        return _TokenScores()

    def fidelity(self) -> Scores:
        """Return the share of tokens predicted as by the teacher, and the divergence per token.

        Of a sparse teacher the divergence is that over its K classes and the tail: no more than that over all classes.
        Of drawn classes it is the estimate of the latter, and the likeliest of them stands for the first.
        """
        return _TokenFidelity({"agreement": Agreement(), "kl_to_teacher": _Divergence()})

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

    @classmethod
    def described(cls, description: str) -> CausalLanguageModeling | None:
        """Return the task of a `description`; None where it describes another."""
        return cls(int(description.removeprefix(NAME))) if description.startswith(NAME) else None


NAME = "next token of "


class _Mean(Mean):
    """A function of the mean over all tokens."""

    def __init__(self, factor: float = 1.0, power: bool = False) -> None:
        super().__init__()
        self.factor, self.power = factor, power

    def update(self, values: Tensor, count: Tensor | int) -> None:
        """Add a sum's parts, and over how many they are."""
        self.add(values, count)

    def compute(self) -> Tensor:
        """Return the mean, or e to its power, over everything added so far."""
        mean = self.factor * self.total / self.count
        return (mean.exp() if self.power else mean).float()


class _TokenScores(Scores):
    """Scores that all follow from the log likelihood of each token that counts."""

    def __init__(self) -> None:
        super().__init__({
            "cross_entropy": _Mean(), "perplexity": _Mean(power=True), "accuracy": _Mean(),
            "bits_per_byte": _Mean(1 / math.log(2)),
        })  # fmt: skip

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch: logits `(B, L, V)`, labels `(B, L)`. Where tokens have no bytes, bits per byte are nan."""
        keep = rows["keep"]
        own, labels = logits[keep].float(), against[keep]
        surprise = F.cross_entropy(own, labels, reduction="none")
        right = torch.where(own.isnan().any(-1), torch.nan, (own.argmax(-1) == labels).float())
        bytes_ = rows["token_bytes"][keep].sum() if "token_bytes" in rows else torch.nan
        for name, metric in self.metrics.items():
            values, counts = (
                (right if name == "accuracy" else surprise),
                (bytes_ if name == "bits_per_byte" else len(own)),
            )
            metric.update(values, counts)  # type: ignore[operator]


class _Divergence(TeacherStudentKL):
    """The divergence from a teacher, or its estimate."""

    def update(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, drawn: bool = False) -> None:
        """Add logits `(N, V)`, or log probabilities as `expected_kl` takes them."""
        if drawn:
            self.add(expected_kl(student, teacher), len(student))
        else:
            super().update(student, teacher, labels)


class _TokenFidelity(Scores):
    """Scores against a teacher's logits, all of them or in sparse form."""

    def update(self, logits: Tensor, against: Tensor | SparseLogits, rows: Batch) -> None:
        """Add a batch: logits `(B, L, V)`."""
        if isinstance(against, Tensor):
            super().update(logits, against, rows)
            return
        own, teacher = logits[rows["keep"]].float(), against.at(rows["keep"])
        log_s, log_t = bucketed(own, teacher.ids), teacher_buckets(teacher, None)
        self.metrics["kl_to_teacher"].update(log_s, log_t, drawn=teacher.drawn)  # type: ignore[operator]
        first = teacher.ids.gather(-1, teacher.values.argmax(-1, keepdim=True))[:, 0]
        same = torch.where(own.isnan().any(-1) | teacher.rest.isnan(), torch.nan, (own.argmax(-1) == first).float())
        half = torch.full_like(same, 0.5)  # two columns, of which the first is larger where both are the same
        self.metrics["agreement"].update(torch.stack([same, half], -1), torch.stack([half + 1, half], -1))  # type: ignore[operator]
