"""Outputs that other caches of the same teacher hold for the same inputs, of any set.

Beside its shards a cache keeps a digest of what the teacher reads of each example, `contents`. A new cache copies the
outputs of every example whose digest another cache of this teacher has, before the teacher predicts the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.models.adapt import PLACES, is_input
from kd_lightning.runtime.errors import CacheError
from kd_lightning.runtime.files import write_file
from kd_lightning.teachers.cache.manifest import CONTENTS, MANIFEST, Manifest, ShardRecord, cannot_write
from kd_lightning.teachers.cache.shards import gather, open_shard, shard_problem, write_shard
from kd_lightning.teachers.cache.upkeep import InUse, Say, read_contents
from kd_lightning.types import Batch

BYTES = 16
"""Of a digest: nobody finds two inputs with the same one."""

Contents = NDArray[np.bytes_]
"""The digest of each example, `(N,)`."""


def contents_of(batches: Iterable[Batch], number: int) -> Contents:
    """Return the digest of what a network reads of each example: all that it is given, without padding.

    What counts of its outputs (`keep`, `masked_places`) is part of it, since only that is stored.

    Args:
        batches: Batches that together contain every example, in any order, with the teacher's entries under the plain
            names.
        number: N, the number of examples.
    """
    found = np.zeros(number, f"S{BYTES}")
    for batch in batches:
        mask = batch.get("attention_mask")
        entries = {name: batch[name] for name in sorted(batch) if is_input(name) or name in ("keep", PLACES)}
        own = (PLACES, "keep") if PLACES in batch else ()  # as wide as the most masked tokens of a text
        rows = {name: _rows(value, batch["keep"] if name in own else mask) for name, value in entries.items()
                if name != "attention_mask"}  # fmt: skip
        heads = {name: f"{name} {entries[name].dtype}".encode() for name in rows}
        for place, index in enumerate(batch["index"].tolist()):
            digest = hashlib.blake2b(digest_size=BYTES)
            for name, of_rows in rows.items():
                digest.update(heads[name])
                digest.update(np.array(of_rows[place].shape, np.int64).tobytes())
                digest.update(of_rows[place].tobytes())
            found[index] = digest.digest()
    return found


def _rows(value: Tensor, mask: Tensor | None) -> Sequence[NDArray[np.generic]]:
    """Return each example's own numbers, of an entry per token only those at its real tokens."""
    array = value.cpu().contiguous().numpy()
    if mask is None or value.shape[:2] != mask.shape:
        return list(array)
    real = mask.cpu().bool().numpy()
    return np.split(array[real], real.sum(1).cumsum()[:-1])


def write_contents(folder: Path, contents: Contents) -> str:
    """Write a cache's digests; return the sha256 for its manifest.

    Raises:
        CacheError: The disk is full or cannot be written.
    """
    try:
        write_file(folder / CONTENTS, contents.tobytes())
    except OSError as error:
        raise cannot_write(folder / CONTENTS, error) from error
    return hashlib.sha256(contents.tobytes()).hexdigest()


class Copying:
    """Copies into a new cache what others hold for the same inputs.

    Args:
        folder: The new cache's.
        manifest: Its manifest, without shards yet; those that are copied are added to it.
        contents: Its examples' digests.
        say: Receives what is copied, and what cannot be.
    """

    def __init__(self, folder: Path, manifest: Manifest, contents: Contents, say: Say) -> None:
        self.folder, self.manifest, self.say = folder, manifest, say
        self._order = np.argsort(contents, kind="stable")
        self._sorted, self._missing = contents[self._order], np.ones(len(contents), bool)

    def take_all(self, others: Iterable[Path]) -> None:
        """Copy from caches of whatever teachers; a damaged file is left alone, with a line that names it."""
        for other in others:
            if other.absolute() == self.folder.absolute() or not self._missing.any():
                continue
            before = int(self._missing.sum())
            try:
                self._take(other)
            except CacheError as error:
                self.say(f"teacher  {error}: nothing is copied from it")
            if copied := before - int(self._missing.sum()):
                self.say(f"teacher  outputs of {copied:,} of {len(self._missing):,} examples are copied from {other}")

    def _take(self, other: Path) -> None:
        in_use = InUse(other)
        theirs = Manifest.read(other / MANIFEST)
        if not theirs.contents or len(theirs.shards) == 0 or not theirs.of_same_teacher(self.manifest):
            return
        self.manifest.specs = self.manifest.specs or theirs.specs
        if theirs.specs != self.manifest.specs:
            return
        contents = np.frombuffer(read_contents(other, theirs), f"S{BYTES}")
        if len(contents) != theirs.num_examples:
            raise CacheError(f"{other} has digests of {len(contents)} examples, not of {theirs.num_examples}")
        for record in theirs.shards:
            if (wrong := shard_problem(other, record)) is not None:
                raise CacheError(wrong)
            self._take_shard(other, record, contents)
        del in_use  # held until here, so that nobody removes the files

    def _take_shard(self, other: Path, record: ShardRecord, contents: Contents) -> None:
        segment = open_shard(other, record)
        if (segment.index >= len(contents)).any():
            raise CacheError(f"{other / record.file} holds examples that its cache does not have")
        rows, places = _pairs(contents[segment.index], self._sorted)
        index, first = np.unique(self._order[places], return_index=True)
        fresh = self._missing[index]
        index, rows = index[fresh], rows[first[fresh]]
        if not len(index):
            return
        tensors = gather(self.manifest.specs, [segment], rows, index)
        copy = write_shard(self.folder, tensors, self.manifest.fingerprint)
        share = len(np.unique(rows)) / len(segment.index)
        self.manifest.shards.append(dataclasses.replace(copy, seconds=record.seconds * share, run=record.run))
        self._missing[index] = False


def _pairs(theirs: Contents, ours: Contents) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all pairs of equal digests, as places in the one and in the other, which is sorted."""
    first, last = np.searchsorted(ours, theirs, "left"), np.searchsorted(ours, theirs, "right")
    number = last - first
    within = np.arange(number.sum()) - np.repeat(number.cumsum() - number, number)
    return np.repeat(np.arange(len(theirs)), number), np.repeat(first, number) + within
