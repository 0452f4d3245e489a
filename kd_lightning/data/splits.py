"""Orders in which examples are dealt out to splits and folds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratified_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return positions in a random order in which every run has the classes in proportion.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> labels[stratified_order(labels, seed=0)]
    array([0, 1, 0, 0, 1, 0, 0, 1, 0])
    """
    generator = np.random.default_rng(seed)
    share = np.empty(len(labels))
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        share[positions] = (np.arange(len(positions)) + 0.5) / len(positions)
    return np.argsort(share, kind="stable")
