"""The next token of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.sparse import bucketed, expected_kl, teacher_buckets
from kd_lightning.losses.term import Term
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.base import Task, refuse_nan
from kd_lightning.tasks.metrics import Mean, kl_of_rows
from kd_lightning.tasks.rows import next_tokens
from kd_lightning.tasks.scores import Scores, ScoreSpec, Values
from kd_lightning.types import Batch, SparseLogits

MOST_SHOWN = 5
"""Of the likeliest next tokens."""
FIRST = 5
"""Tokens among which the teacher's likeliest is looked for."""
AFTER = {"1-16": (1, 16), "17-64": (17, 64), "65-256": (65, 256), "257-1024": (257, 1024), "1025+": (1025, math.inf)}
"""Ranges of places in a text: how many tokens the network has read that predicts the next one."""
MOST_LOGITS = 2**24
"""Numbers that a score computes with at once: 64 MB in float32, whatever the batch and the vocabulary."""


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
        return _TokenScores()

    def fidelity(self) -> Scores:
        """Return the shares of tokens predicted as by the teacher, and the divergence per token.

        `agreement` is that of the likeliest token, `agreement_top5` that the teacher's is among the first five.

        Of a sparse teacher the divergence is that over its K classes and the tail: no more than that over all classes.
        Of drawn classes it is the estimate of the latter, and the likeliest of them stands for the first. The values
        also have it by ranges of places in a document (`AFTER`).
        """
        return _TokenFidelity({"agreement": _Mean(), "agreement_top5": _Mean(), "kl_to_teacher": _Mean()})

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
        numbers = torch.where(batch.get("attention_mask", rows["keep"]) > 0, _documents(rows), -1)
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
        frequencies = labels.bincount().double() / len(labels)
        return float(-frequencies.xlogy(frequencies).sum())

    @classmethod
    def described(cls, description: str) -> CausalLanguageModeling | None:
        """Return the task of a `description`; None where it describes another."""
        return cls(int(description.removeprefix(NAME))) if description.startswith(NAME) else None


NAME = "next token of "


class _Mean(Mean):
    """The mean over all tokens, or e to its power."""

    def __init__(self, power: bool = False) -> None:
        super().__init__()
        self.power = power

    def update(self, values: Tensor, count: Tensor | int) -> None:
        """Add a sum's parts, and over how many they are."""
        self.add(values, count)

    def compute(self) -> Tensor:
        """Return it for everything added so far."""
        mean = self.total / self.count
        return (mean.exp() if self.power else mean).float()


class _TokenScores(Scores):
    """Scores that all follow from the log likelihood of each token that counts."""

    def __init__(self) -> None:
        names = ("cross_entropy", "perplexity", "accuracy", "bits_per_byte")
        super().__init__({name: _Mean(power=name == "perplexity") for name in names})

    def update(self, logits: Tensor | SparseLogits, against: Tensor, rows: Batch) -> Values:
        """Add a batch: logits `(B, L, V)`, labels `(B, L)`. Where tokens have no bytes, bits per byte are nan.

        Of the K largest logits the likeliest token is known, and how likely the label is only where it is one of them:
        elsewhere that is nan, and so is each mean that it is part of.
        """
        keep, found = rows["keep"], []
        for at in _pieces(keep, logits.shape[-1]):
            labels = against[at]
            if isinstance(logits, SparseLogits):
                surprise, first, own = _of_sparse(logits.at(at), labels)
            else:
                own = logits[at].float()
                surprise, first = F.cross_entropy(own, labels, reduction="none"), own.argmax(-1)
            found.append((surprise, torch.where(own.isnan().any(-1), torch.nan, (first == labels).float())))
        surprise, right = map(torch.cat, zip(*found, strict=True))
        one = torch.ones_like(surprise)
        of = {"cross_entropy": (surprise, one), "accuracy": (right, one)}
        if "token_bytes" in rows:
            of["bits_per_byte"] = (surprise / math.log(2), rows["token_bytes"][keep])
        means = {"perplexity": of["cross_entropy"], "bits_per_byte": (surprise, surprise.new_full((), torch.nan)), **of}
        _add(self, means)
        return Values(_documents(rows)[keep], of)


class _TokenFidelity(Scores):
    """Scores against a teacher's logits, all of them or in sparse form."""

    def update(self, logits: Tensor, against: Tensor | SparseLogits, rows: Batch) -> Values:
        """Add a batch: logits `(B, L, V)`."""
        keep, found = rows["keep"], []
        for at in _pieces(keep, logits.shape[-1]):
            own = logits[at].float()
            if isinstance(against, Tensor):
                teacher = against[at].float()
                divergence, first, nan = kl_of_rows(own, teacher), teacher.argmax(-1), teacher.isnan().any(-1)
            else:
                sparse = against.at(at)
                compare = expected_kl if sparse.drawn else kl_of_rows
                divergence = compare(bucketed(own, sparse.ids), teacher_buckets(sparse, None))
                first = sparse.likeliest
                nan = sparse.values.isnan().any(-1) | sparse.rest.isnan()
            among = own.topk(min(FIRST, own.shape[-1])).indices == first[:, None]
            valid = torch.where(own.isnan().any(-1) | nan, torch.nan, 1.0)
            found.append((divergence, valid * (own.argmax(-1) == first), valid * among.any(-1)))
        divergence, same, among = map(torch.cat, zip(*found, strict=True))
        one = torch.ones_like(divergence)
        of = {"agreement": (same, one), "agreement_top5": (among, one), "kl_to_teacher": (divergence, one)}
        _add(self, of)
        read = _read_before(rows)[keep]
        inside = {name: ((read >= low) & (read <= high)).float() for name, (low, high) in AFTER.items()}
        ranges = {f"kl_to_teacher/{n}": (torch.where(one > 0, divergence, 0), one) for n, one in inside.items()}
        return Values(_documents(rows)[keep], of | ranges)


def _of_sparse(sparse: SparseLogits, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels' surprise, nan outside of the K tokens, what is likeliest, and log probabilities."""
    log_p, among = teacher_buckets(sparse, None), sparse.ids == labels[:, None]
    surprise = -log_p[:, : among.shape[-1]].where(among, 0).sum(-1)
    return surprise.where(among.any(-1), torch.nan), sparse.likeliest, log_p


def _pieces(keep: Tensor, classes: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the places of rows that count, as many at a time as have `MOST_LOGITS` logits together."""
    for places in torch.split(keep.nonzero(), max(1, MOST_LOGITS // classes)):
        yield places.unbind(1)


def _add(scores: Scores, means: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add values and their weights to the metrics of these names."""
    for name, metric in scores.metrics.items():
        values, weights = means[name]
        metric.update(values, weights.sum())  # type: ignore[operator]


def _documents(rows: Batch) -> Tensor:
    """Return which document each token is of, `(B, L)`; where that is not known, the number of its row."""
    number = rows["index"] if "index" in rows else torch.arange(len(rows["keep"]), device=rows["keep"].device)
    return rows.get("document_ids", rows.get("of_document", number[:, None].expand_as(rows["keep"])))


def _read_before(rows: Batch) -> Tensor:
    """Return how many tokens of its text each row has read, its own included, `(B, L)`."""
    if "position_ids" in rows:
        return rows["position_ids"] + 1
    return rows.get("attention_mask", torch.ones_like(rows["input_ids"])).cumsum(1)
