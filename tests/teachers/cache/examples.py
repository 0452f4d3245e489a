"""A teacher whose answers are known: drawn once for every example, padded as a batch needs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.shards import Limits
from kd_lightning.teachers.cache.store import DEFAULT_STORAGE, TeacherCache
from kd_lightning.types import Batch, ModelOutput

KEY: dict[str, Any] = {"teacher": {"weights": "a1", "precision": "32-true"}, "data": "d1", "max_length": 64}
SMALL = Limits(shard_bytes=4000, shard_seconds=1000.0, resident_bytes=10**9)
MAPPED = Limits(shard_bytes=4000, shard_seconds=1000.0, resident_bytes=0)


class Known:
    """`number` examples of 0 to 9 tokens with 3 (or more) classes, vectors, hidden states and attention."""

    def __init__(self, number: int, classes: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.number = number
        self.lengths = torch.randint(0, 10, (number,), generator=generator)
        self.lengths[: min(2, number)] = 9
        self.logits = torch.randn(number, classes, generator=generator) * 5
        self.vector = torch.randn(number, 4, 2, generator=generator)
        self.hidden = [torch.randn(int(n), 5, generator=generator) for n in self.lengths]
        self.scores = [torch.randn(int(n), classes, generator=generator) * 5 for n in self.lengths]
        self.attention = [torch.rand(2, int(n), int(n), generator=generator) for n in self.lengths]

    def mask(self, index: Tensor, padded: int = 0, left: bool = False) -> Tensor:
        """The attention mask of a batch, padded to its longest example or further."""
        lengths = self.lengths[index]
        longest = max(int(lengths.max()), padded, 1)
        mask = torch.arange(longest) < lengths[:, None]
        return (mask.flip(1) if left else mask).long()

    def say(self, index: Tensor, mask: Tensor, outside: float = 0.0, features: bool = True) -> ModelOutput:
        """The answer to a batch, `outside` where there is no token."""
        if not features:
            return ModelOutput(self.logits[index])
        real = mask.bool()
        hidden = torch.full((*mask.shape, 5), outside)
        hidden[real] = torch.cat([self.hidden[i] for i in index])
        attention = torch.full((len(index), 2, *[mask.shape[1]] * 2), outside)
        for row, keep, i in zip(attention, real, index, strict=True):
            row[:, keep[:, None] & keep[None, :]] = self.attention[i].flatten(1)
        return ModelOutput(self.logits[index], {"vector": self.vector[index], "hidden": hidden, "map": attention})

    def batches(self, size: int = 8, seed: int = 0) -> list[Batch]:
        """All examples once, shuffled."""
        order = torch.randperm(self.number, generator=torch.Generator().manual_seed(seed))
        return [{"index": rows, "attention_mask": self.mask(rows)} for rows in order.split(size)]

    def ask(self, batch: Batch) -> ModelOutput:
        return self.say(batch["index"], batch["attention_mask"])


def full(folder: Path, known: Known, limits: Limits = SMALL, storage: Storage = DEFAULT_STORAGE) -> TeacherCache:
    """A cache with every answer written."""
    cache = TeacherCache.create(folder, KEY, known.number, storage, teacher="T", data="D", limits=limits)
    for batch in known.batches():
        cache.add(batch["index"], known.ask(batch), batch["attention_mask"])
    cache.flush()
    return cache


def same(one: ModelOutput, other: ModelOutput) -> bool:
    """Whether two answers are equal to the bit."""
    return (
        torch.equal(one.logits, other.logits)
        and one.features.keys() == other.features.keys()
        and all(torch.equal(one.features[name], other.features[name]) for name in one.features)
    )


def reads_back(folder: Path, known: Known, limits: Limits = SMALL) -> None:
    """Assert that a folder holds every answer, once."""
    cache = TeacherCache.open(folder, KEY, known.number, limits=limits)
    assert cache.complete
    assert cache.manifest.known == known.number
    index = torch.arange(known.number)
    mask = known.mask(index)
    assert same(cache.lookup(index, mask), known.say(index, mask))


def count(folder: Path, number: int) -> None:
    """Note, in a way that many processes can, how many examples the teacher was asked about."""
    with (folder / "asked").open("ab") as file:
        file.write(b"x" * number)
        file.flush()
        os.fsync(file.fileno())


def dense_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Top-k logits with the rest of the mass spread evenly, from probabilities, in float64."""
    z = logits.astype(np.float64)
    out = np.empty_like(z)
    for row, to in zip(z.reshape(-1, z.shape[-1]), out.reshape(-1, z.shape[-1]), strict=True):
        order = np.argsort(-row)
        mass = np.exp(row[order[k:]]).sum()
        to[:] = np.log(mass / (len(row) - k))
        to[order[:k]] = row[order[:k]]
    return out
