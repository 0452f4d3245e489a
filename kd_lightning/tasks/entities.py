"""Entities in tagged words: tag schemes, spans, and scores by seqeval's rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from kd_lightning.types import IGNORE

Scheme = Literal["bio", "bioes", "io"]
"""How tags mark entities: first word B and the others I; also the last word E and a single one S; or I alone."""

OUTSIDE = "O"
_PREFIXES: dict[Scheme, str] = {"bio": "BI", "bioes": "BIES", "io": "I"}
_NAMES: dict[Scheme, str] = {"bio": "BIO", "bioes": "BIOES", "io": "IO"}
_MAY_FOLLOW = {"B": "IE", "I": "IE", "E": "", "S": "", "O": ""}


@dataclass(frozen=True, order=True)
class Span:
    """An entity: the words from `start` up to, but without, `stop`."""

    start: int
    stop: int
    type: str


def split_tag(tag: str) -> tuple[str, str] | None:
    """Return a tag's prefix and entity type; None where it is no tag.

    >>> split_tag("B-PER"), split_tag("O"), split_tag("PER")
    (('B', 'PER'), ('O', ''), None)
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, _, kind = tag.partition("-")
    return (prefix, kind) if prefix in ("B", "I", "E", "S") and kind else None


def scheme_of(tags: Iterable[str]) -> Scheme:
    """Return the scheme of tags: BIOES with an E or S among them, else BIO with a B, else IO.

    >>> scheme_of(["O", "B-PER", "I-PER"])
    'bio'
    """
    prefixes = {parts[0] for tag in tags if (parts := split_tag(tag))}
    return "bioes" if prefixes & {"E", "S"} else "bio" if "B" in prefixes else "io"


def tags_of(types: Iterable[str], scheme: Scheme) -> list[str]:
    """Return all tags of entity types: O, then each type's in the scheme's order.

    >>> tags_of(["PER", "LOC"], "bio")
    ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER']
    """
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in sorted(set(types)) for prefix in _PREFIXES[scheme])]


def tag_problem(tags: Sequence[str], scheme: Scheme) -> tuple[int, str] | None:
    """Return where and how the tags of a text first break a scheme; None if they do not.

    >>> tag_problem(["O", "I-PER"], "bio")
    (1, 'I-PER follows O: an entity begins with B-PER in BIO')
    >>> tag_problem(["B-PER", "O"], "bioes")
    (1, 'O follows B-PER: an entity ends with E-PER in BIOES, and a single word is S-PER')
    """
    known, before = _PREFIXES[scheme], (OUTSIDE, "")
    for i, tag in enumerate([*tags, OUTSIDE]):
        parts = split_tag(tag)
        if parts is None or parts[0] not in known + OUTSIDE:
            wanted = ", ".join(f"{prefix}-TYPE" for prefix in known)
            return i, f"{tag!r} is no tag of {_NAMES[scheme]}: expected O, {wanted}"
        follows = parts[0] in _MAY_FOLLOW[before[0]] and parts[1] == before[1]
        last, this = "-".join(filter(None, before)), tag if i < len(tags) else "the end"
        if scheme != "io" and parts[0] in "IE" and not follows:
            return i, f"{tag} follows {last}: an entity begins with B-{parts[1]} in {_NAMES[scheme]}"
        if scheme == "bioes" and before[0] in ("B", "I") and not follows:
            kind = before[1]
            place = min(i, len(tags) - 1)
            return place, f"{this} follows {last}: an entity ends with E-{kind} in BIOES, and a single word is S-{kind}"
        before = parts
    return None


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Return the entities of tags by seqeval's rules, also where tags break the scheme.

    An I or E continues the entity of a B or I of its own type before it; anywhere else it begins one.

    >>> spans_of(["B-PER", "I-PER", "O", "I-LOC", "I-PER"])
    [Span(start=0, stop=2, type='PER'), Span(start=3, stop=4, type='LOC'), Span(start=4, stop=5, type='PER')]
    """
    found: list[Span] = []
    before = (OUTSIDE, "")
    for i, tag in enumerate(tags):
        prefix, kind = parts = split_tag(tag) or (OUTSIDE, "")
        if prefix in ("I", "E") and before[0] in ("B", "I") and kind == before[1]:
            found[-1] = Span(found[-1].start, i + 1, kind)
        elif prefix != OUTSIDE:
            found.append(Span(i, i + 1, kind))
        before = parts
    return found


def tags_from(spans: Iterable[Span], words: int, scheme: Scheme) -> list[str]:
    """Return the tags of so many words that mark entities, which must not overlap.

    >>> tags_from([Span(0, 2, "PER"), Span(3, 4, "LOC")], 4, "bioes")
    ['B-PER', 'E-PER', 'O', 'S-LOC']
    """
    tags = [OUTSIDE] * words
    for span in spans:
        tags[span.start : span.stop] = [f"I-{span.type}"] * (span.stop - span.start)
        if scheme != "io":
            tags[span.start] = f"B-{span.type}"
        if scheme == "bioes":
            tags[span.stop - 1] = f"{'E' if span.stop - span.start > 1 else 'S'}-{span.type}"
    return tags


class EntityScores(Metric):
    """Micro-averaged precision, recall and F1 of entities, as in seqeval's default mode (conlleval).

    An entity is right where its first word, last word and type are. Only counts are kept, one set for each type. Of
    texts that stand in several rows (windows), the tags are kept too, so that an entity across windows counts once.

    Args:
        tags: The tag of each class.

    >>> metric = EntityScores(["O", "B-PER", "I-PER"])
    >>> logits = torch.eye(3)[torch.tensor([[1, 2, 0, 1]])]
    >>> metric.update(logits, torch.tensor([[1, 2, 0, 0]]))  # one of the two entities is there
    >>> {name: round(float(value), 2) for name, value in metric.compute().items()}
    {'f1': 0.67, 'precision': 0.5, 'recall': 1.0, 'PER/f1': 0.67}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    predicted: Tensor
    expected: Tensor
    invalid: Tensor
    pieces: list[Tensor]
    prefix: Tensor
    kind: Tensor

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__()
        parts = [split_tag(tag) or (OUTSIDE, "") for tag in tags]
        self.types = sorted({kind for prefix, kind in parts if prefix != OUTSIDE})
        codes = torch.tensor(["OBIES".index(prefix) for prefix, _ in parts])
        kinds = torch.tensor([self.types.index(kind) if kind else -1 for _, kind in parts])
        self.register_buffer("prefix", codes, persistent=False)
        self.register_buffer("kind", kinds, persistent=False)
        for name in ("correct", "predicted", "expected"):
            self.add_state(name, default=torch.zeros(len(self.types), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("invalid", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pieces", default=[], dist_reduce_fx="cat")

    def update(
        self, logits: Tensor, labels: Tensor, document: Tensor | None = None, index: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            logits: `(B, L, C)`.
            labels: `(B, L)` int64; `IGNORE` where no word begins.
            document: `(B,)`, of which text a row is a window, -1 where it is a whole text; None: all are.
            index: `(B,)`, by which the windows of a text follow each other.
        """
        known = labels != IGNORE
        self.invalid += (logits.isnan().any(-1) & known).sum()
        row, position = known.nonzero(as_tuple=True)
        predicted, expected = logits.argmax(-1)[known], labels[known]
        if document is not None and index is not None:
            cut = (document >= 0)[row]
            piece = torch.stack([document[row], index[row], position, predicted, expected], dim=1)[cut]
            if len(piece):
                self.pieces.append(piece)
            row, predicted, expected = row[~cut], predicted[~cut], expected[~cut]
        self._add(self._counted(row, predicted, expected))

    def compute(self) -> dict[str, Tensor]:
        """Return F1, precision and recall over everything added so far, and each type's F1; 0 of nothing."""
        self.settle()
        correct, predicted, expected = self.correct, self.predicted, self.expected
        found = {
            "f1": _share(2 * correct.sum(), predicted.sum() + expected.sum()),
            "precision": _share(correct.sum(), predicted.sum()),
            "recall": _share(correct.sum(), expected.sum()),
        }
        by_type = _share(2 * correct, predicted + expected)
        found |= {f"{kind}/f1": value for kind, value in zip(self.types, by_type, strict=True)}
        return {name: torch.where(self.invalid > 0, torch.nan, value) for name, value in found.items()}

    def settle(self) -> None:
        """Count the windows added so far: all windows of their texts are taken to be among them."""
        pieces = self.pieces if isinstance(self.pieces, list) else [self.pieces]
        if pieces:
            rows = torch.cat(pieces)
            for column in (2, 1, 0):
                rows = rows[rows[:, column].argsort(stable=True)]
            self._add(self._counted(rows[:, 0], rows[:, 3], rows[:, 4]))
            self.pieces = []

    def _add(self, counts: Sequence[Tensor]) -> None:
        self.correct, self.predicted, self.expected = (
            own + more for own, more in zip((self.correct, self.predicted, self.expected), counts, strict=True)
        )

    def _counted(self, text: Tensor, predicted: Tensor, expected: Tensor) -> list[Tensor]:
        """Return the three counts by type of words `(N,)`; a text's words follow each other."""
        ends, wanted = self._ends(text, predicted), self._ends(text, expected)
        of_predicted, of_expected = self.kind[predicted], self.kind[expected]
        right = (ends == wanted) & (wanted >= 0) & (of_predicted == of_expected)
        chosen = (of_expected[right], of_predicted[ends >= 0], of_expected[wanted >= 0])
        return [torch.bincount(kinds, minlength=len(self.types)) for kinds in chosen]

    def _ends(self, text: Tensor, tags: Tensor) -> Tensor:
        """Return where the entity that begins at each word ends, -1 where none begins, `(N,)`; see `spans_of`."""
        prefix, kind = self.prefix[tags], self.kind[tags]
        continues = torch.zeros_like(tags, dtype=torch.bool)
        within = ((prefix[1:] == 2) | (prefix[1:] == 3)) & ((prefix[:-1] == 1) | (prefix[:-1] == 2))
        continues[1:] = within & (kind[1:] == kind[:-1]) & (text[1:] == text[:-1])
        inside = prefix != 0
        last = inside.clone()
        last[:-1] &= ~continues[1:]
        ends = torch.full_like(tags, -1)
        ends[inside & ~continues] = last.nonzero().squeeze(1)  # entities do not overlap: each has one begin and one end
        return ends


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return a share, 0 of nothing."""
    return part / whole.clamp(min=1)
