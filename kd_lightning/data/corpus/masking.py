"""Blocks with masked tokens, which follow from text, mask and seed: nothing is stored of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd_lightning.data.corpus.blocks import BlockDataset, Blocks, Packing
from kd_lightning.data.sampler import Positions, Turn
from kd_lightning.data.text.tokens import around_text, special_tokens
from kd_lightning.data.text.trim import PREFIX
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.mixing import mixed
from kd_lightning.types import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 2
"""Goes up when blocks are masked otherwise."""

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token, and a random one; the others stay as they are."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Masking:
    """BERT's masking (Devlin et al. 2018, arXiv 1810.04805, section 3.1).

    Of a text's n tokens that are no special ones, max(1, round(p n)) are chosen, whose own ids are the labels. A chosen
    token becomes the mask token with probability 0.8, a random token that is no special one with 0.1, and stays as it
    is with 0.1. A text of special tokens alone has none.

    Attributes:
        probability: p.
        mask_token_id: The mask token.
        special: Ids of the special tokens, `(S,)`.
        vocabulary: How many tokens there are.
        seed: Of all choices.
    """

    probability: float
    mask_token_id: int
    special: Ints
    vocabulary: int
    seed: int

    @cached_property
    def ordinary(self) -> Ints:
        """The ids of all tokens that are no special ones."""
        return np.setdiff1d(np.arange(self.vocabulary), self.special)

    def __call__(
        self, ids: Ints, real: NDArray[np.bool_], key: NDArray[np.uint64], turn: Ints
    ) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Return the tokens with masks, the places of the chosen ones, and which of these count.

        Args:
            ids: `(B, L)`.
            real: False at padding, `(B, L)`.
            key: A number of each text, `(B,)`.
            turn: Which of a text's masks, `(B,)`.

        Returns:
            `(B, L)`, and `(B, M)` twice, M the most that a text has: ascending places, then 0 where none is left.
        """
        rows, length = mixed(mixed(key, self.seed) ^ turn.astype(np.uint64), 0), ids.shape[1]
        draws = (rows[:, None] + np.arange(length, dtype=np.uint64)).astype(np.uint64)
        may = real & ~np.isin(ids, self.special)
        able = may.sum(1)
        count = np.minimum(np.maximum(np.rint(self.probability * able).astype(np.int64), 1), able)
        order = np.argsort(np.where(may, mixed(draws, 1), np.uint64(2**64 - 1)), axis=1, kind="stable")
        most = max(int(count.max()), 1)
        places = np.sort(np.where(np.arange(most) < count[:, None], order[:, :most], length), axis=1)
        keep = places < length
        at = np.arange(len(ids)).repeat(keep.sum(1)), places[keep]
        chance = mixed(draws, 2)[at] / 2.0**64
        other = self.ordinary[(mixed(draws, 3)[at] % np.uint64(len(self.ordinary))).astype(np.int64)]
        found = ids.copy()
        found[at] = np.where(
            chance < MASKED, self.mask_token_id, np.where(chance < MASKED + RANDOM, other, found[at])
        )  # fmt: skip
        return found, np.where(keep, places, 0), keep


@dataclass(frozen=True)
class MaskedBlocks:
    """Blocks of all splits, masked; those of the training split several times, each time otherwise.

    Examples are the training blocks by their first mask, then by each other one, then the blocks of the other splits.
    A block's masks follow from its first document's text and the place in it, whatever other documents there are:
    scores of runs that train on more or fewer of them are of the same masked tokens.

    Attributes:
        blocks: The blocks, without the tokens around a text.
        masking: How they are masked.
        before: The tokens that begin a text.
        after: Those that end it.
        train: How many of the blocks are for training: the first ones.
        sets: How many masks each of these has.
    """

    blocks: Blocks
    masking: Masking
    before: Sequence[int]
    after: Sequence[int]
    train: int
    sets: int

    def __len__(self) -> int:
        return len(self.blocks) + (self.sets - 1) * self.train

    @property
    def lengths(self) -> Ints:
        """Tokens in each example, `(len(self),)`."""
        lengths = self.blocks.lengths + len(self.before) + len(self.after)
        return np.concatenate([np.tile(lengths[: self.train], self.sets), lengths[self.train :]])

    def of(self, index: Ints) -> tuple[Ints, Ints]:
        """Return the block of each example, and which of its masks it has."""
        further = (self.sets - 1) * self.train
        trained = index < self.train + further
        block = np.where(trained, index % self.train, index - further)
        return block, np.where(trained, index // self.train, 0)

    def batch(self, block: Ints, turn: Ints) -> Batch:
        """Return blocks by their masks, padded on the right.

        Args:
            block: Which blocks, `(B,)`.
            turn: Which of its masks each has, `(B,)`.

        Returns:
            `input_ids` and `attention_mask`, `(B, L)` int64; of the M masked tokens `masked_places`, `labels` (the
            tokens before they were masked, else `IGNORE`) and `of_document`, `(B, M)` int64, and `keep`, `(B, M)` bool.
        """
        plain = self.blocks.batch(block)
        real, inner = plain["attention_mask"].numpy() > 0, plain["input_ids"].numpy()
        first, size = len(self.before), real.sum(1)
        ids = np.pad(inner, ((0, 0), (first, len(self.after))), constant_values=self.blocks.pad_token_id)
        ids[:, :first] = self.before
        for number, token in enumerate(self.after):
            ids[np.arange(len(ids)), first + size + number] = token
        there = np.arange(ids.shape[1]) < (first + size + len(self.after))[:, None]
        inside = there & (np.arange(ids.shape[1]) >= first) & (np.arange(ids.shape[1]) < (first + size)[:, None])
        found, places, keep = self.masking(ids, inside, self.blocks.keys(block), turn)
        documents = np.pad(plain["of_document"].numpy(), ((0, 0), (first, len(self.after))), constant_values=-1)
        entries = {
            "input_ids": found, "attention_mask": there.astype(np.int64), "masked_places": places, "keep": keep,
            "labels": np.where(keep, np.take_along_axis(ids, places, 1), IGNORE),
            "of_document": np.where(keep, np.take_along_axis(documents, places, 1), -1),
        }  # fmt: skip
        return {name: torch.from_numpy(entry) for name, entry in entries.items()}


class MaskedDataset(BlockDataset):
    """A run of masked blocks.

    Args:
        blocks: All there are.
        span: Which of their examples these are.
        fresh: Whether each epoch has masks of its own, whose positions are behind those of the run, epoch after epoch.
            Their `index` is that of the block by its first mask.
    """

    blocks: MaskedBlocks  # type: ignore[assignment]

    def __init__(self, blocks: MaskedBlocks, span: range, fresh: bool = False) -> None:
        super().__init__(blocks, span)  # type: ignore[arg-type]
        self.fresh = fresh

    def _turn(self, epoch: int) -> Turn:
        train, turn = self.blocks.train, epoch if self.fresh else epoch % self.blocks.sets
        return np.arange(turn * train, (turn + 1) * train), self.lengths[:train]

    def __getitem__(self, positions: Positions | Sequence[int]) -> Batch:
        index = np.asarray(positions, np.int64) + self.span.start
        if self.fresh:
            block, turn = index % self.blocks.train, index // self.blocks.train
            index = block
        else:
            block, turn = self.blocks.of(index)
        return self.blocks.batch(block, turn) | {"index": torch.from_numpy(index)}


@dataclass(frozen=True)
class Masks:
    """What the options of `CorpusData` say of masks.

    Attributes:
        probability: Share of a block's tokens.
        sets: How many masks each training block has; None: another one in every epoch.

    Raises:
        ConfigError: One out of its range.
    """

    probability: float
    sets: int | None

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ConfigError(f"data.mask_probability={self.probability}: expected a number from 0 to below 1")
        if self.sets is not None and self.sets < 1:
            raise ConfigError(f"data.mask_sets={self.sets}: expected 1 or more, or null")

    def check(self, packing: Packing, tokenizer: str, cross_tokenizer: bool) -> None:
        """Refuse what masked blocks cannot have.

        Raises:
            ConfigError: Names the key to change.
        """
        given = f"data.mask_probability={self.probability:g}"
        if packing == "documents":
            raise ConfigError(
                f"{given} with data.packing=documents: networks that read both sides do not keep documents apart; set "
                "data.packing=none, or concat"
            )
        if cross_tokenizer or tokenizer.startswith(PREFIX):
            key = "data.cross_tokenizer=true" if cross_tokenizer else f"data.tokenizer={tokenizer}"
            raise ConfigError(f"{given} with {key}: masked tokens are compared one by one, of whole vocabularies")

    def room(self, tokenizer: PreTrainedTokenizerFast, block_size: int) -> int:
        """Return how many tokens of a block are text.

        Raises:
            ConfigError: The tokenizer has no mask token, or those around a text leave no room.
        """
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                "data.tokenizer has no mask token: give that of a masked language model, such as minilm, or "
                "wordpiece:8000 to learn one from the text"
            )
        around = sum(map(len, around_text(tokenizer)))
        if block_size < around + 2:
            raise ConfigError(
                f"data.block_size={block_size}: {around} of these are the tokens that the tokenizer puts around a "
                f"text; set {around + 2} or more"
            )
        return block_size - around

    def of(self, blocks: Blocks, train: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> MaskedBlocks:
        """Return blocks masked, the first `train` of them for training."""
        special = special_tokens(tokenizer)
        masking = Masking(self.probability, int(tokenizer.mask_token_id), special, len(tokenizer), seed)
        return MaskedBlocks(blocks, masking, *around_text(tokenizer), train, self.sets or 1)

    def key(self, seed: int) -> dict[str, Any]:
        """Return what decides the masks, as JSON values."""
        return {**asdict(self), "seed": seed, "version": VERSION}
