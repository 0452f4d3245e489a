"""Which rows of token-level logits are compared, and with which labels."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.types import IGNORE, Batch


def next_tokens(batch: Batch) -> Batch:
    """Return the batch of a causal language model: row t of the logits predicts token t + 1.

    Masks determine which tokens count, never token ids: padding may be the token that ends a text.

    Args:
        batch: Tokens `(B, L)`. `attention_mask`, absent where none is padding. `labels`, the tokens themselves, or
            `IGNORE` where they are not predicted (a prompt, the first token of a packed text). `keep`, if given, are
            the rows that predict one, as a teacher's outputs are stored; by default they follow from the labels.

    Returns:
        The batch with `labels` and `keep` `(B, L)` one position to the left, at the rows that predict. The last row
        predicts nothing, nor does padding to the left of the first token.

    >>> mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    >>> ids = torch.tensor([[9, 5, 6, 7], [8, 9, 9, 9]])
    >>> rows = next_tokens({"input_ids": ids, "labels": ids, "attention_mask": mask})
    >>> rows["keep"].int().tolist(), rows["labels"][rows["keep"]].tolist()
    ([[0, 1, 1, 0], [1, 0, 0, 0]], [6, 7, 9])
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    read = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    counts, rows = read, dict(batch)
    if "labels" in batch:
        rows["labels"] = _left(batch["labels"], IGNORE)
        counts = batch["labels"] != IGNORE
    rows["keep"] = batch["keep"] & read if "keep" in batch else _left(counts & read, False) & read
    return rows


def _left(values: Tensor, last: int) -> Tensor:
    """Return values `(B, L)` one position to the left, with `last` in the last."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], dim=1)
