"""Spans of a context for a question: the best of a window, SQuAD's rules, scores of questions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric

from kd_lightning.losses.span_soft_target import span_soft_target
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.retrieval import Kept
from kd_lightning.tasks.scores import Scores, Values
from kd_lightning.types import IGNORE, Batch

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, no punctuation, no articles, single spaces.

    >>> normalised("The  U.S. Army's band")
    'us armys band'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, known: Iterable[str]) -> float:
    """Return 1 where a text is one of the known answers, by SQuAD's rules, else 0; "" is no answer.

    >>> exact_match("the Oslo fjord.", ["Oslo Fjord"]), exact_match("", [])
    (1.0, 1.0)
    """
    return float(any(normalised(predicted) == normalised(one) for one in _golden(known)))


def overlap_f1(predicted: str, known: Iterable[str]) -> float:
    r"""Return the F1 of a text's words and the nearest known answer's, by SQuAD's rules; "" is none.

    With c words in common, counted as often as both have them, :math:`F_1 = 2c / (|predicted| + |known|)`; where one of
    the two has no words, 1 if both have none, else 0 (Rajpurkar et al. 2016, arXiv 1606.05250; 2018, arXiv 1806.03822).

    >>> overlap_f1("in Oslo", ["Oslo, Norway", "Bergen"])
    0.5
    """
    return max(_f1(normalised(predicted).split(), normalised(one).split()) for one in _golden(known))


def _golden(known: Iterable[str]) -> list[str]:
    """Return the known answers that have words, or "" where none has."""
    return [one for one in known if normalised(one)] or [""]


def _f1(predicted: list[str], known: list[str]) -> float:
    if not predicted or not known:
        return float(predicted == known)
    return 2 * (Counter(predicted) & Counter(known)).total() / (len(predicted) + len(known))


class Best(NamedTuple):
    """The best span of each window.

    Attributes:
        start: Its first token, `(B,)`.
        end: Its last token, `(B,)`.
        score: The sum of their two logits, `(B,)`; -inf where the window has no tokens of a context, NaN where a logit
            that counts is NaN or inf.
        none: That of no answer, both logits at the first token, `(B,)`.
        chance: The product of the two probabilities of start and end, `(B,)`.
        none_chance: That of no answer, `(B,)`.
    """

    start: Tensor
    end: Tensor
    score: Tensor
    none: Tensor
    chance: Tensor
    none_chance: Tensor


def best_spans(logits: Tensor, keep: Tensor, most: int) -> Best:
    """Return the best span of each window: kept tokens, the end not before the start, at most so many.

    Args:
        logits: Of starts and ends, `(B, L, 2)`.
        keep: The tokens of the context, and the first of all, which stands for no answer, `(B, L)`.
        most: Tokens.

    >>> logits = torch.tensor([[[0.0, 0.0], [2.0, 9.0], [3.0, 1.0], [1.0, 2.0]]])
    >>> best = best_spans(logits, torch.tensor([[True, False, True, True]]), 2)
    >>> best.start.tolist(), best.end.tolist(), best.score.tolist(), best.none.tolist()
    ([2], [3], [5.0], [0.0])
    """
    logits = logits.double()  # the sum of two large numbers of float32 may be none
    inside = keep.clone()
    inside[:, 0] = False
    start, end = logits.masked_fill(~inside.unsqueeze(2), -torch.inf).unbind(2)
    length = logits.shape[1]
    score = torch.full_like(start[:, 0], -torch.inf)
    first, extra = (torch.zeros_like(score, dtype=torch.long) for _ in range(2))
    for more in range(min(most, length)):
        value, place = (start[:, : length - more] + end[:, more:]).max(1)
        better = value > score
        score, first = torch.where(better, value, score), torch.where(better, place, first)
        extra = extra.masked_fill(better, more)
    invalid = ((logits.isnan() | logits.isposinf()).any(2) & keep).any(1)
    score, none = (x.masked_fill(invalid, torch.nan) for x in (score, logits[:, 0].sum(1)))
    total = logits.masked_fill(~keep.unsqueeze(2), -torch.inf).logsumexp(1).sum(1)
    return Best(first, first + extra, score, none, (score - total).exp(), (none - total).exp())


def decided(question: Tensor, score: Tensor, none: Tensor, may_be_none: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the windows of each question come to.

    Args:
        question: The number of each window's question, `(N,)`.
        score: Of the window's best span, `(N,)`.
        none: Of no answer there, `(N,)`.
        may_be_none: A question may have no answer: it has none where even the least `none` is above the best score.

    Returns:
        The questions `(Q,)`, the window of each one's best span `(Q,)`, and whether it is an answer `(Q,)`.

    >>> decided(torch.tensor([4, 4, 7]), torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, 5.0, 1.0]), True)
    (tensor([4, 7]), tensor([1, 2]), tensor([ True, False]))
    """
    order = score.argsort(descending=True, stable=True)
    order = order[question[order].argsort(stable=True)]
    found, counts = torch.unique_consecutive(question[order], return_counts=True)
    row = order[counts.cumsum(0) - counts]
    least = none.new_zeros(len(found)).scatter_reduce(
        0, torch.searchsorted(found, question.contiguous()), none, "amin", include_self=False
    )
    there = score[row] > -torch.inf
    return found, row, there & (score[row] >= least) if may_be_none else there


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where a piece of a text begins and ends without white space, as tokens of bytes have it.

    >>> trimmed("in Oslo", 2, 7)
    (3, 7)
    """
    piece = text[start:end]
    begin = end - len(piece.lstrip())
    return begin, begin + len(piece.strip())


@dataclass(frozen=True, eq=False)
class Contexts:
    """The texts behind windows of tokens, from which spans become text.

    Attributes:
        texts: The context of each question.
        answers: The known answers of each question, none where it has none; None: nobody knows.
        chars: Where each token begins and ends in its context, `(T, 2)`.
        offsets: Where each window's tokens begin among these, `(N + 1,)`, by `index`.
    """

    texts: Sequence[str]
    answers: Sequence[Sequence[str] | None]
    chars: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def characters(self, question: int, window: int, start: int, end: int) -> tuple[int, int]:
        """Return where a span of tokens of a window begins and ends in the context of its question."""
        begin = int(self.offsets[window])
        return trimmed(self.texts[question], int(self.chars[begin + start, 0]), int(self.chars[begin + end, 1]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: nothing in it changes."""
        return self


class SpanScores(Scores):
    """Exact match and F1 of the texts that windows of a question come to together, by SQuAD's rules.

    Args:
        contexts: The data's texts.
        most: Tokens of a span.
        may_be_none: Questions may have no answer.
    """

    divides = False

    def __init__(self, contexts: Contexts | None, most: int, may_be_none: bool) -> None:
        super().__init__({"kept": Kept()})
        self.contexts, self.most, self.may_be_none = contexts, most, may_be_none
        self._values: Values | None = None

    @property
    def names(self) -> list[str]:
        """Of the scores."""
        return ["exact_match", "f1", *(["has_answer/f1", "no_answer/f1"] if self.may_be_none else [])]

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch; windows of questions whose answers nobody knows are left out."""
        best = best_spans(logits, rows["keep"], self.most)
        columns = torch.stack(
            [x.double() for x in (rows["index"], rows["question"], best.start, best.end, best.score, best.none)], 1
        )[(against != IGNORE).any(1)]
        self.metrics["kept"].update(columns[:, :0], columns[:, :0], columns)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes; NaN where a logit is NaN or inf.

        Raises:
            ConfigError: The task is of no data, and there are no texts to compare.
        """
        columns: Tensor = self.metrics["kept"].compute()[2]  # type: ignore[operator]
        self._values = None
        if not len(columns) or columns.isnan().any():
            return {name: columns.new_tensor(torch.nan).float() for name in self.names}
        if self.contexts is None:
            raise ConfigError("the scores of question answering are of texts: use the `task` of the data")
        index, question, start, end = columns[:, :4].cpu().long().unbind(1)
        score, none = columns[:, 4:].cpu().unbind(1)
        questions, row, there = decided(question, score, none, self.may_be_none)
        known = [self.contexts.answers[one] or () for one in questions.tolist()]
        found = []
        for one, window, first, last, is_answer in zip(
            *(x.tolist() for x in (questions, index[row], start[row], end[row], there)), strict=True
        ):
            begin, stop = self.contexts.characters(one, window, first, last) if is_answer else (0, 0)
            found.append(self.contexts.texts[one][begin:stop])
        f1 = torch.tensor([overlap_f1(text, golden) for text, golden in zip(found, known, strict=True)])
        exact = torch.tensor([exact_match(text, golden) for text, golden in zip(found, known, strict=True)])
        has = torch.tensor([bool(golden) for golden in known]).float()
        parts = {"exact_match": (exact, torch.ones_like(has)), "f1": (f1, torch.ones_like(has))}
        if self.may_be_none:
            by_kind = {"has_answer/f1": has, "no_answer/f1": 1 - has}
            parts |= {name: (f1 * kind, kind) for name, kind in by_kind.items() if kind.any()}
        self._values = Values(questions, parts)
        return {name: (value.sum() / weight.sum()).to(columns.device) for name, (value, weight) in parts.items()}

    def values(self) -> Values | None:
        """Return each question's scores, as of the last `compute`."""
        return self._values

    def states(self) -> Tensor:
        """Refuse: a question's windows are scored together.

        Raises:
            TypeError: Always.
        """
        raise TypeError("the windows of a question are scored together: scores of a split's parts do not add up")


class SpanFidelity(Scores):
    """How near windows' starts and ends are to a teacher's: the same span, and the divergence.

    Args:
        most: Tokens of a span.
        may_be_none: A window may have no answer.
    """

    def __init__(self, most: int, may_be_none: bool) -> None:
        super().__init__({name: MeanMetric(nan_strategy="disable") for name in ("agreement", "kl_to_teacher")})
        self.most, self.may_be_none = most, may_be_none

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> Values:
        """Add a batch."""
        keep = rows["keep"]
        spans = [self._spans(side, keep) for side in (logits, against)]
        same = (spans[0] == spans[1]).all(1).float().masked_fill(torch.stack(spans).isnan().any(2).any(0), torch.nan)
        divergence = span_soft_target(logits, against, mask=keep, reduction="none")
        found = {"agreement": same, "kl_to_teacher": divergence}
        for name, value in found.items():
            self.metrics[name].update(value)  # type: ignore[operator]
        return Values(rows["question"], {name: (value, torch.ones_like(value)) for name, value in found.items()})

    def _spans(self, logits: Tensor, keep: Tensor) -> Tensor:
        """Return the first and last token of each window's span, 0 where that is no answer; NaN of NaN."""
        best = best_spans(logits, keep, self.most)
        span = torch.stack([best.start, best.end], 1).double()
        if self.may_be_none:
            span = span.masked_fill((best.none > best.score).unsqueeze(1), 0)
        return span.masked_fill(best.score.isnan().unsqueeze(1), torch.nan)
