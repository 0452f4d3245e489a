"""Blocks as a teacher with another tokenizer reads them, and which tokens are the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.corpus.blocks import BlockDataset, Blocks
from kd_lightning.data.corpus.store import CorpusStore
from kd_lightning.data.sampler import Positions
from kd_lightning.types import IGNORE, Batch

VERSION = 1
"""Raised when a teacher reads other tokens of the same blocks."""

Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """A document's part in a block, as a teacher reads it.

    Attributes:
        ids: The teacher's tokens, `(L,)`.
        widths: The bytes of text that each stands for, `(L,)`.
        counted: 1 where one counts, else 0, `(L,)`.
        spans: `(M, 4)`: where the student's and the teacher's tokens of the same bytes begin and end, each of them
            counted from the beginning of the part, and each with a token before it in the part.
    """

    ids: Ints
    widths: Ints
    counted: Ints
    spans: Ints


class Turns(NamedTuple):
    """The runs of tokens that count in a store's conversations, in order.

    Attributes:
        begins: Where in the store each begins, `(N,)`.
        ends: Where it ends, `(N,)`.
        documents: The conversation it is of, `(N,)`.
        sizes: Its bytes, `(N,)`.
    """

    begins: Ints
    ends: Ints
    documents: Ints
    sizes: Ints

    @classmethod
    def of(cls, store: CorpusStore) -> Turns:
        """Find them."""
        assert store.counted is not None
        before, after = (np.zeros(len(store.counted) + 1, np.bool_) for _ in range(2))
        before[1:] = after[:-1] = store.counted
        before[store.offsets] = after[store.offsets] = False  # no run goes on in another conversation
        begins = np.flatnonzero(store.counted & ~before[:-1])
        ends = np.flatnonzero(store.counted & ~after[1:]) + 1
        places = np.stack([begins, ends], 1).ravel()
        sizes = np.add.reduceat(np.append(store.widths, 0).astype(np.int64), places)[::2] if len(places) else begins
        return cls(begins, ends, np.searchsorted(store.offsets, begins, side="right") - 1, sizes)


@dataclass(frozen=True)
class TeacherReading:
    """The same documents as a teacher's tokenizer encodes them.

    A block is a run of the student's tokens, and so of the text's bytes. The teacher reads the tokens that lie within
    these bytes, behind the special tokens that it puts before any text, also where a block begins within a document.

    Both sides' tokens end at some of the bytes. Between two successive ones at which both do lie spans of one or more
    tokens that are the same text: the smallest that can be compared. Tokens of no bytes (a BOS on one side, the later
    tokens of a character in several) belong to the span that ends there; the token that ends a document is a span.

    Conversations are written by a chat template on each side. What is compared are the assistant's turns that count,
    where they are as many bytes on both sides, and so the same text; the token that ends a turn is a span.

    Attributes:
        blocks: The student's.
        store: The teacher's documents, in the same order.
        before: What its tokenizer puts before a text.
        ends: Whether documents end with a token for it, on both sides.
        pad_token_id: What shorter rows are filled up with.
        special: The special tokens of the student and of the teacher, which may end a turn.
    """

    blocks: Blocks
    store: CorpusStore
    before: Ints
    ends: bool
    pad_token_id: int
    special: tuple[Ints, Ints]

    @property
    def lengths(self) -> Ints:
        """About how many tokens the teacher reads of each block, `(N,)`, by how many all of the text has."""
        share = int(self.store.offsets[-1]) / max(int(self.blocks.store.offsets[-1]), 1)
        found: Ints = np.ceil(self.blocks.lengths * share).astype(np.int64) + len(self.before)
        return found

    @cached_property
    def turns(self) -> tuple[Turns, Turns]:
        """Those of the student and of the teacher."""
        return Turns.of(self.blocks.store), Turns.of(self.store)

    @cached_property
    def compared(self) -> tuple[Ints, Ints]:
        """Which turns of the student and of the teacher are the same text, `(M,)` and `(M,)`."""
        own, other = self.turns
        counts = [np.bincount(one.documents, minlength=len(self.store)) for one in (own, other)]
        alike = counts[0] == counts[1]  # else nobody knows which is which
        mine, theirs = (np.flatnonzero(alike[one.documents]) for one in (own, other))
        same = own.sizes[mine] == other.sizes[theirs]
        return mine[same], theirs[same]

    def conversation(self, document: int) -> Piece:
        """Return a conversation, with spans within the turns that are the same text."""
        mine, theirs = self.compared
        of, found = self.turns[0].documents[mine], [np.zeros((0, 4), np.int64)]
        for pair in range(int(np.searchsorted(of, document)), int(np.searchsorted(of, document, side="right"))):
            begin, text, stop = self._turn(0, document, int(mine[pair]))
            teacher_begin, teacher_text, teacher_stop = self._turn(1, document, int(theirs[pair]))
            own, other = (
                np.cumsum(store.widths[store.offsets[document] :][first:last], dtype=np.int64)
                for store, first, last in ((self.blocks.store, begin, text), (self.store, teacher_begin, teacher_text))
            )
            found.append(_spans(own, other, 0, 0, 0) + np.array([begin, begin, teacher_begin, teacher_begin]))
            if text < stop and teacher_text < teacher_stop:
                found.append(np.array([[text, text + 1, teacher_text, teacher_text + 1]]))
        chosen = slice(*self.store.offsets[document : document + 2])
        assert self.store.counted is not None
        columns = self.store.tokens, self.store.widths, self.store.counted
        ids, widths, counted = (column[chosen].astype(np.int64) for column in columns)
        # its model expects them before any text, also where the template (`plain`) does not write them
        shift = 0 if np.array_equal(ids[: len(self.before)], self.before) else len(self.before)
        widths, counted = (np.pad(column, (shift, 0)) for column in (widths, counted))
        spans = np.concatenate(found) + np.array([0, 0, shift, shift])
        return Piece(np.concatenate([self.before[:shift], ids]), widths, counted, _predicted(spans))

    def _turn(self, side: int, document: int, number: int) -> tuple[int, int, int]:
        """Return where in its conversation a turn begins, its text ends, and the tokens behind it end."""
        store, turns = (self.blocks.store, self.store)[side], self.turns[side]
        begin, stop = int(turns.begins[number]), int(turns.ends[number])
        text = stop
        while text > begin and store.tokens[text - 1] in self.special[side]:
            text -= 1
        start = int(store.offsets[document])
        return begin - start, text - start, stop - start

    def piece(self, document: int, first: int, stop: int) -> Piece:
        """Return the part of a document that is the student's tokens `first` to `stop`."""
        own, other = _ends(self.blocks.store, document), _ends(self.store, document)
        whole = stop == len(own) and self.ends
        if self.ends:
            own, other = own[:-1], other[:-1]
        own_stop = min(stop, len(own))
        begin, end = (int(own[first - 1]) if first else 0), (int(own[own_stop - 1]) if own_stop else 0)
        start = int(np.searchsorted(other, begin, side="right")) if first else 0
        if start < len(other) and (int(other[start - 1]) if start else 0) < begin:
            start += 1  # it began before the block
        last = max(int(np.searchsorted(other, end, side="right")), start)
        student, teacher = own[first:own_stop], other[start:last]
        more = self.before if first else self.before[:0]  # a document's own beginning has it already
        offset = self.store.offsets[document]
        chosen = slice(offset + start, offset + last)
        ids, widths = self.store.tokens[chosen].astype(np.int64), self.store.widths[chosen].astype(np.int64)
        ids, widths = np.concatenate([more, ids]), np.concatenate([np.zeros(len(more), np.int64), widths])
        spans = _spans(student, teacher, begin, int(other[start - 1]) if start else 0, len(more))
        if own_stop < len(own) and own[own_stop] == end:  # the block ends within a character
            spans = spans[spans[:, 1] < len(student)]
        if whole:
            ids = np.append(ids, int(self.store.tokens[self.store.offsets[document + 1] - 1]))
            widths = np.append(widths, 0)
            if (len(student) and len(teacher) and student[-1] == teacher[-1]) or not len(own):
                place = len(student), len(student) + 1, len(ids) - 1, len(ids)
                spans = np.concatenate([spans, np.array([place], np.int64)])
        return Piece(ids, widths, np.ones_like(ids), _predicted(spans))

    def batch(self, index: Ints) -> tuple[Batch, torch.Tensor]:
        """Return blocks as the teacher reads them, and their spans `(B, M, 4)`, zero where a row has fewer.

        A span is where the student's tokens begin and end in the student's row, and where the teacher's do in its own.
        """
        rows = [self._row(int(self.blocks.begins[i]), int(self.blocks.ends[i])) for i in index]
        width, most = max(len(row[0]) for row in rows), max(1, max(len(row[-1]) for row in rows))
        names, fill = ("input_ids", "token_bytes", "document_ids", "counted"), (self.pad_token_id, 0, -1, 0)
        found = {
            name: np.stack([_padded(row[place], width, value) for row in rows])
            for place, (name, value) in enumerate(zip(names, fill, strict=True))
        }
        document = found["document_ids"]
        found["attention_mask"] = (document >= 0).astype(np.int64)
        inside = np.zeros_like(document, bool)
        inside[:, 1:] = (document[:, 1:] >= 0) & (
            (document[:, 1:] == document[:, :-1]) | (self.blocks.packing == "concat")
        )
        counts = inside & (found.pop("counted") > 0)
        found["labels"] = np.where(counts, found["input_ids"], IGNORE)
        if self.store.counted is not None:
            found["keep"] = np.pad(counts[:, 1:], ((0, 0), (0, 1)))
        if self.blocks.packing == "documents":
            place = np.broadcast_to(np.arange(width), document.shape)
            begun = np.maximum.accumulate(np.where(inside, 0, place), axis=1)
            found["position_ids"] = np.where(document >= 0, place - begun, 0)
        else:
            del found["document_ids"]
        spans = np.stack([np.concatenate([row[-1], np.zeros((most - len(row[-1]), 4), np.int64)]) for row in rows])
        return {name: torch.from_numpy(value) for name, value in found.items()}, torch.from_numpy(spans)

    def _row(self, begin: int, end: int) -> tuple[Ints, ...]:
        """Return a block's tokens, bytes, documents, which tokens count, and spans."""
        starts = self.blocks.starts
        numbers = range(int(np.searchsorted(starts, begin, side="right")) - 1, int(np.searchsorted(starts, end)))
        parts: list[tuple[Ints, ...]] = []
        student = teacher = 0
        for number in numbers:
            first, stop = max(begin - int(starts[number]), 0), int(min(end, starts[number + 1]) - starts[number])
            if stop <= first:
                continue
            document = int(self.blocks.documents[number])
            whole = self.store.counted is not None  # no conversation is cut
            piece = self.conversation(document) if whole else self.piece(document, first, stop)
            spans = piece.spans + np.array([student, student, teacher, teacher])
            parts.append((piece.ids, piece.widths, np.full_like(piece.ids, document), piece.counted, spans))
            student, teacher = student + stop - first, teacher + len(piece.ids)
        return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _ends(store: CorpusStore, document: int) -> Ints:
    """Return after how many bytes of a document each of its tokens ends."""
    return np.cumsum(store.widths[store.offsets[document] : store.offsets[document + 1]], dtype=np.int64)


def _spans(student: Ints, teacher: Ints, begin: int, teacher_begin: int, shift: int) -> Ints:
    """Return spans between bytes at which both sides' tokens end; `shift` stand before the teacher's."""
    common = np.intersect1d(student, teacher)
    if begin == teacher_begin:
        common = np.union1d(common, [begin])
    own = np.searchsorted(student, common, side="right")
    other = np.searchsorted(teacher, common, side="right") + shift
    return np.stack([own[:-1], own[1:], other[:-1], other[1:]], axis=1).astype(np.int64).reshape(-1, 4)


def _predicted(spans: Ints) -> Ints:
    """Leave out spans that no token stands before."""
    return spans[(spans[:, 0] > 0) & (spans[:, 2] > 0)]


def _padded(row: Ints, width: int, value: int) -> Ints:
    return np.pad(row, (0, width - len(row)), constant_values=value)


class AlignedDataset(BlockDataset):
    """A run of blocks with what a teacher reads of them: under `teacher_*`, with `spans`; or that alone.

    Args:
        reading: All blocks.
        span: Which of them these are.
        alone: Only the teacher's tokens, under the plain names.
    """

    def __init__(self, reading: TeacherReading, span: range, alone: bool) -> None:
        super().__init__(reading.blocks, span)
        self.reading, self.alone = reading, alone

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        index = np.asarray(positions, np.int64) + self.span.start
        teacher, spans = self.reading.batch(index)
        if self.alone:
            return teacher | {"index": torch.from_numpy(index)}
        more = {f"teacher_{name}": value for name, value in teacher.items() if name not in ("labels", "token_bytes")}
        return super().__getitem__(positions) | more | {"spans": spans}
