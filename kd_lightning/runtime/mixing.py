"""Numbers that look random and follow from what they are for: no generator, and so no state."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mixed(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Return hashes mixed with a seed (SplitMix64's finaliser, Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        x = hashes + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed_: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
        return mixed_


def mixed_seed(*numbers: int) -> int:
    """Mix integers into one 63-bit seed with SplitMix64's finaliser."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
