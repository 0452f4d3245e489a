"""Splits of documents, by their texts: no two splits have copies of one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.corpus.store import CorpusStore
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.mixing import mixed

log = logging.getLogger(__name__)


def splits_of(store: CorpusStore, shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Return which documents each split has; the training documents in an order that their texts decide.

    Args:
        store: The documents.
        shares: Of the training documents, to hold out for a split that is not given.
        seed: Of the draw and the order.

    Raises:
        DataError: Too few documents to hold some out.
    """
    ends = np.cumsum(list(store.counts.values()))
    found = {name: np.arange(end - count, end) for (name, count), end in zip(store.counts.items(), ends, strict=True)}
    missing = [name for name in shares if name not in found]
    train = found["train"]
    if missing:
        texts = len(np.unique(store.hashes[train]))
        sizes = {name: max(1, round(shares[name] * texts)) for name in missing}
        if sum(sizes.values()) >= texts:
            raise DataError(
                f"data.train_file: {texts} different documents are too few to hold some out: give "
                f"more, or {' and '.join(f'data.{name}_file' for name in missing)}"
            )
        drawn = split_documents(store.hashes[train], sizes, seed)
        found |= {name: train[positions] for name, positions in drawn.items()}
    held_out = np.concatenate([store.hashes[found[name]] for name in shares])
    both = np.isin(store.hashes[found["train"]], held_out)
    if both.any():
        log.warning("left out %d training documents that are validation or test documents too", both.sum())
    train = found["train"][~both]
    order = np.argsort(mixed(store.hashes[train], seed), kind="stable")
    return {"train": train[order], **{name: found[name] for name in shares}}


def split_documents(hashes: NDArray[np.uint64], sizes: Mapping[str, int], seed: int) -> dict[str, NDArray[np.int64]]:
    """Hold documents out, by their content alone: copies of one text never stand in two splits.

    Args:
        hashes: Of the documents' texts, `(N,)`.
        sizes: How many different texts each split gets.
        seed: Of the draw.

    Returns:
        The positions of the rest, under `train`, and of each split.

    >>> found = split_documents(np.array([7, 8, 7, 9], np.uint64), {"test": 1}, seed=0)
    >>> {name: positions.tolist() for name, positions in found.items()}
    {'train': [1, 3], 'test': [0, 2]}
    """
    texts, copies = np.unique(hashes, return_inverse=True)
    rank = np.empty(len(texts), np.int64)
    rank[np.argsort(mixed(texts, seed), kind="stable")] = np.arange(len(texts))
    ends = np.cumsum(list(sizes.values()))
    part = np.searchsorted(ends, rank[copies], side="right")
    found = {"train": np.flatnonzero(part == len(sizes))}
    return found | {name: np.flatnonzero(part == number) for number, name in enumerate(sizes)}
