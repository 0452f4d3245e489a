"""Scores of predicted tokens of a vocabulary, from logits of rows that count, a few of them at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.sparse import bucketed, expected_kl, teacher_buckets
from kd_lightning.tasks.metrics import Mean, kl_of_rows
from kd_lightning.tasks.scores import Scores, Values
from kd_lightning.types import Batch, SparseLogits

FIRST = 5
"""Tokens among which the teacher's likeliest is looked for."""
MOST_LOGITS = 2**24
"""Numbers that a score computes with at once: 64 MB in float32, whatever the batch and the vocabulary."""


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


class TokenScores(Scores):
    """Scores that all follow from the log likelihood of each token that counts.

    Args:
        names: Which of `cross_entropy`, `perplexity`, `accuracy` and `bits_per_byte`.
    """

    def __init__(self, names: Sequence[str]) -> None:
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
        return Values(documents_of(rows)[keep], of)


class TokenFidelity(Scores):
    """Shares of tokens predicted as by a teacher, and the divergence per token.

    `agreement` is that of the likeliest token, `agreement_top5` that the teacher's is among the first five.

    Of a sparse teacher the divergence is that over its K classes and the tail: no more than that over all classes. Of
    drawn classes it is the estimate of the latter, and the likeliest of them stands for the first.

    Args:
        after: Ranges of how many tokens a row has read, by name; the values have the divergence by them, too.
    """

    def __init__(self, after: Mapping[str, tuple[float, float]] | None = None) -> None:
        super().__init__({"agreement": _Mean(), "agreement_top5": _Mean(), "kl_to_teacher": _Mean()})
        self.after = after or {}

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
        read = _read_before(rows)[keep] if self.after else one
        inside = {name: ((read >= low) & (read <= high)).float() for name, (low, high) in self.after.items()}
        ranges = {f"kl_to_teacher/{n}": (torch.where(one > 0, divergence, 0), one) for n, one in inside.items()}
        return Values(documents_of(rows)[keep], of | ranges)


def entropy(labels: Tensor) -> float:
    """Return the cross-entropy of the best constant prediction, the frequencies of the labels `(N,)`."""
    frequencies = labels.bincount().double() / len(labels)
    return float(-frequencies.xlogy(frequencies).sum())


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


def documents_of(rows: Batch) -> Tensor:
    """Return which document each token is of, `(B, L)`; where that is not known, the number of its row."""
    number = rows["index"] if "index" in rows else torch.arange(len(rows["keep"]), device=rows["keep"].device)
    return rows.get("document_ids", rows.get("of_document", number[:, None].expand_as(rows["keep"])))


def _read_before(rows: Batch) -> Tensor:
    """Return how many tokens of its text each row has read, its own included, `(B, L)`."""
    if "position_ids" in rows:
        return rows["position_ids"] + 1
    return rows.get("attention_mask", torch.ones_like(rows["input_ids"])).cumsum(1)
