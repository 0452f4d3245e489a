"""Blocks: runs of a fixed number of tokens, cut out of documents that stand one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.batches import BatchDataset, merged
from kd_lightning.data.corpus.store import CorpusStore
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.mixing import mixed
from kd_lightning.types import IGNORE, Batch

Packing = Literal["documents", "concat", "none"]
PADDING = {"labels": IGNORE, "document_ids": -1, "of_document": -1}
"""What stands at the padding of a batch's entries, if not 0; the token there is the data's."""
"""What stands in a block: `documents`, one after the other, of which none sees another and each counts its positions
from 0; the same documents as one text (`concat`); or one document alone (`none`). Longer documents are cut."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of all splits, one after the other.

    Where only some tokens of the documents count, no others are labels, and a batch says also which rows of logits
    predict one (`keep`), so that no others need to be stored of a teacher.

    Attributes:
        store: The documents.
        documents: Which of them stand one after the other, `(M,)`: a row of tokens of which blocks are runs.
        begins: Where in that row each block begins, `(N,)`.
        ends: Where it ends, `(N,)`.
        packing: What a block's tokens see of each other.
        pad_token_id: What shorter blocks of a batch are filled up with. It may be a token of the text too.
    """

    store: CorpusStore
    documents: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    packing: Packing
    pad_token_id: int

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where in the row each document begins and the last one ends, `(M + 1,)`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.store.lengths[self.documents])])

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each block, `(N,)`."""
        return self.ends - self.begins

    def keys(self, index: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return a number of each block, `(B,)`, which its first document's text and the place in it decide."""
        begin = self.begins[index]
        first = np.searchsorted(self.starts, begin, side="right") - 1
        hashes = mixed(self.store.hashes[self.documents[first]], 0)
        return mixed(hashes ^ (begin - self.starts[first]).astype(np.uint64), 0)

    def batch(self, index: NDArray[np.int64]) -> Batch:
        """Return blocks, padded on the right to the longest of them.

        Args:
            index: Which blocks, `(B,)`.

        Returns:
            `(B, L)` int64: `input_ids`, `attention_mask`, `labels` (see below) and `token_bytes`, how many bytes each
            token stands for. With `packing="documents"` also `document_ids`, -1 at padding, and `position_ids`,
            which begin at 0 where a document does, where a block does, and at every padding; otherwise `of_document`.

            A label is the token itself. It is `IGNORE` where the block holds nothing to predict it from: at padding, at
            a block's first token and, with `packing="documents"`, at each document's first one; and where it does not
            count. What is padding and what counts follows from where tokens stand, never from ids.
        """
        begin, end = self.begins[index, None], self.ends[index, None]
        place = begin + np.arange((end - begin).max())
        mask = place < end
        place = np.where(mask, place, begin)
        document = np.searchsorted(self.starts, place, side="right") - 1
        start = self.starts[document]
        source = self.store.offsets[self.documents[document]] + place - start
        ids = np.where(mask, self.store.tokens[source].astype(np.int64), self.pad_token_id)
        predicted = mask.copy()
        predicted[:, 0] = False
        found = {"input_ids": ids, "attention_mask": mask, "token_bytes": np.where(mask, self.store.widths[source], 0)}
        number = np.where(mask, self.documents[document], -1)
        if self.packing == "documents":
            predicted[:, 1:] &= number[:, 1:] == number[:, :-1]
            found |= {"document_ids": number, "position_ids": np.where(mask, place - np.maximum(start, begin), 0)}
        else:
            found["of_document"] = number
        if self.store.counted is not None:
            predicted &= self.store.counted[source]
            found["keep"] = np.pad(predicted[:, 1:], ((0, 0), (0, 1)))
        found["labels"] = np.where(predicted, ids, IGNORE)
        return {
            name: torch.from_numpy(entry if name == "keep" else entry.astype(np.int64)) for name, entry in found.items()
        }


@dataclass(frozen=True)
class JoinedBlocks:
    """Blocks, and behind them those of other documents, whose batches have the same entries.

    Attributes:
        first: The blocks.
        more: Those behind; where no batch of `first` has `keep`, which rows count follows from their labels alone.
    """

    first: Blocks
    more: Blocks

    def __len__(self) -> int:
        return len(self.first) + len(self.more)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each block, `(N,)`."""
        return np.concatenate([self.first.lengths, self.more.lengths])

    def batch(self, index: NDArray[np.int64]) -> Batch:
        """Return blocks of both kinds, as `Blocks.batch` does."""
        later = index >= len(self.first)
        found = []
        for blocks, rows, start in ((self.first, ~later, 0), (self.more, later, len(self.first))):
            if rows.any():
                batch = blocks.batch(index[rows] - start)
                if self.first.store.counted is None:
                    batch.pop("keep", None)
                found.append((torch.from_numpy(rows), batch, {**PADDING, "input_ids": blocks.pad_token_id}))
        return merged(found, len(index))


def cut(
    store: CorpusStore, parts: Mapping[str, NDArray[np.int64]], block_size: int, packing: Packing, pad_token_id: int,
    limits: Mapping[str, int] | None = None, spread: Mapping[str, int] | None = None,
) -> tuple[Blocks, list[int]]:  # fmt: skip
    """Cut documents into blocks.

    A block of one token, in which there is nothing to predict, is left out. Documents of which only some tokens count
    (conversations, none longer than a block) are never cut: a block has as many as fit.

    Args:
        store: The documents.
        parts: Which of them each split has, in order.
        block_size: Tokens of a block; the last one of a split or, with `packing="none"`, of a document may have fewer.
        packing: What stands in a block.
        pad_token_id: What shorter blocks are filled up with.
        limits: Take only so many tokens of a split, its first ones.
        spread: Take about so many tokens of a split, in blocks from all over it.

    Returns:
        The blocks of all splits, and how many each split has.

    Raises:
        DataError: A split without anything to predict.
    """
    begins, ends, counts, total = [], [], [], 0
    for name, documents in parts.items():
        lengths = store.lengths[documents]
        size = int(lengths.sum())
        stop = min(size, (limits or {}).get(name, size))
        if store.counted is not None:
            begin, end = _whole(lengths, 1 if packing == "none" else block_size)
            begin, end = begin[end <= stop], end[end <= stop]
        elif packing == "none":
            first = np.cumsum(lengths) - lengths
            pieces = -(-lengths // block_size)
            number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            begin = np.repeat(first, pieces) + number * block_size
            end = np.minimum(begin + block_size, np.repeat(first + lengths, pieces))
        else:
            begin = np.arange(0, stop, block_size)
            end = begin + block_size
        end = np.minimum(end, stop)
        kept = end - begin > 1
        if not kept.any():
            raise DataError(
                f"the {name} split has {size} tokens{f', of which {stop} make no block' * (stop < size)}: a language "
                "model needs two or more to predict one"
            )
        if spread and name in spread:
            kept = _thinned(kept, (end - begin)[kept].sum() / spread[name])
        begins.append(begin[kept] + total)
        ends.append(end[kept] + total)
        counts.append(int(kept.sum()))
        total += size
    everything = np.concatenate(list(parts.values()))
    return Blocks(store, everything, np.concatenate(begins), np.concatenate(ends), packing, pad_token_id), counts


def _thinned(kept: NDArray[np.bool_], times: float) -> NDArray[np.bool_]:
    """Return one in so many of the places that are True, evenly spaced; all where that is one or less."""
    places = np.flatnonzero(kept)
    count = max(round(len(places) / max(times, 1.0)), 1)
    chosen = places[((np.arange(count) + 0.5) * len(places) / count).astype(np.int64)]
    thinned = np.zeros_like(kept)
    thinned[chosen] = True
    return thinned


def _whole(lengths: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where blocks begin and end that have as many whole documents as `most` tokens hold, or one."""
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[lengths > 0])])
    places = [0]
    while places[-1] < len(starts) - 1:
        fits = int(np.searchsorted(starts, starts[places[-1]] + most, side="right")) - 1
        places.append(max(fits, places[-1] + 1))
    found = starts[places]
    return found[:-1], found[1:]


def unpacked(batch: Batch) -> list[Batch]:
    """Return a batch with each document of a block in a row of its own, as one reads it when deployed.

    Rows are padded on the right, like ones together, so that no batch has more tokens than the blocks did. What counts
    is the same; a document of which nothing counts is left out. A batch without documents is returned as it is.
    """
    if "document_ids" not in batch:
        return [batch]
    names = [name for name, entry in batch.items() if entry.ndim == 2 and name not in ("document_ids", "position_ids")]
    rows = []
    for block, documents in enumerate(batch["document_ids"]):
        for number in documents[documents >= 0].unique_consecutive():
            here = documents == number
            if (batch["labels"][block, here] != IGNORE).any():
                rows.append({name: batch[name][block, here] for name in names} | {"index": batch["index"][block]})
    rows.sort(key=lambda row: len(row["input_ids"]))
    most, found = batch["input_ids"].numel(), []
    while rows:
        longest = len(rows[-1]["input_ids"])
        count = max(most // longest, 1)
        rows, together = rows[:-count], rows[-count:]
        found.append({name: _together(name, [row[name] for row in together]) for name in (*names, "index")})
    return found


def _together(name: str, rows: list[torch.Tensor]) -> torch.Tensor:
    if name == "index":
        return torch.stack(rows)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE if name == "labels" else 0)


class BlockDataset(BatchDataset):
    """A run of blocks.

    Args:
        blocks: All there are.
        span: Which of them these are.
    """

    def __init__(self, blocks: Blocks | JoinedBlocks, span: range) -> None:
        self.blocks, self.span = blocks, span

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each block, `(len(self),)`."""
        return self.blocks.lengths[self.span.start : self.span.stop]

    def _turn(self, epoch: int) -> Turn:
        return np.arange(len(self)), self.lengths

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        index = np.asarray(positions, np.int64) + self.span.start
        return self.blocks.batch(index) | {"index": torch.from_numpy(index)}
