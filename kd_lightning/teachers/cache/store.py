"""`TeacherCache`: teacher outputs by example, shared between processes through files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.manifest import MANIFEST, REFRESH, Manifest, remedy
from kd_lightning.teachers.cache.outputs import Storage, check_shapes, encode_all, named, specs_of
from kd_lightning.teachers.cache.shards import (
    Limits,
    Segment,
    join,
    shard_problem,
    write_shard,
)
from kd_lightning.teachers.cache.stored import StoredOutputs
from kd_lightning.teachers.cache.upkeep import InUse, Say, drop_damaged, locked, log, problems, shard_files, sweep
from kd_lightning.types import ModelOutput, SparseLogits

DEFAULT_STORAGE = Storage()
DEFAULT_LIMITS = Limits()
Begin = Callable[[Path, Manifest], None]


class TeacherCache(StoredOutputs):
    """Teacher outputs by example `index`. Use `create`, `open` or `refreshing` instead of the constructor.

    Any number of processes may read without a lock. Adding needs no lock either: each shard is written under the lock,
    after the shards that others wrote meanwhile have been read. A process that runs the teacher on everything missing
    holds the lock throughout (`writing`), so that no two compute the same.

    Args:
        folder: With the manifest and the shards.
        manifest: As read from the folder.
        limits: When shards are written and what is held in memory.
        manifest_name: `refresh.json` while an older cache in the same folder is still valid.
        in_use: Held since before the manifest was read, so that nobody removes the files.

    Attributes:
        run: The run that has the teacher predict what is added, noted with it; empty outside of runs.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, limits: Limits, manifest_name: str = MANIFEST, *, in_use: InUse
    ) -> None:
        super().__init__(folder, manifest, limits)
        self._manifest_name, self._in_use = manifest_name, in_use
        self.run = ""
        self._waiting: list[int] = []  # segments not yet in a file
        self._waiting_bytes = 0
        self._written = time.monotonic()
        self._seconds = 0.0

    # -- creating and opening -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, folder: Path, key: dict[str, Any], num_examples: int, storage: Storage = DEFAULT_STORAGE, *,
        teacher: str = "", data: str = "", limits: Limits = DEFAULT_LIMITS, begin: Begin | None = None,
    ) -> Self:  # fmt: skip
        """Create a cache, or open an existing one with this key and storage.

        Args:
            folder: Its folder; `FOLDER.lock` beside it is its lock.
            key: Everything that determines the outputs, as nested plain values: weights and code of the teacher,
                tokenizer, preprocessing, data, precision, requested outputs.
            num_examples: N, the number of examples; their `index` goes from 0 to N - 1.
            storage: The encoding of the outputs.
            teacher: A name for people, shown by `kd-cache info`.
            data: Likewise.
            limits: When shards are written and what is held in memory.
            begin: Called with the folder and the manifest of a cache that is new, before it exists for others; what it
                writes and adds to the manifest is part of it from the beginning, or not at all after a kill.

        Raises:
            CacheError: The folder cannot be written, or holds a cache that is damaged or of something else.
        """
        folder = Path(folder)
        manifest = Manifest(key, num_examples, storage, teacher=teacher, data=data)
        in_use = InUse(folder, make=True)
        if not (folder / MANIFEST).exists():
            with locked(folder):
                if not (folder / MANIFEST).exists():
                    if begin is not None:
                        begin(folder, manifest)
                    manifest.write(folder / MANIFEST)
        found = cls.open(folder, key, num_examples, limits=limits, in_use=in_use)
        if found.manifest.storage != storage:
            raise CacheError(
                f"{folder} was stored as {found.manifest.storage}, not as {storage}: give another path, "
                "or set teacher.cache=refresh"
            )
        return found

    @classmethod
    def open(
        cls, folder: Path, key: dict[str, Any] | None = None, num_examples: int | None = None, *,
        repair: bool = False, say: Say = log.warning, limits: Limits = DEFAULT_LIMITS, in_use: InUse | None = None,
    ) -> Self:  # fmt: skip
        """Open a cache after checking its manifest, the size and sha256 of each shard, and its key.

        Args:
            folder: Its folder.
            key: The key it must have; None accepts any.
            num_examples: The number of examples it must be for.
            repair: Drop damaged shards, whose examples are computed again, instead of refusing the cache.
            say: Receives a line for each dropped shard.
            limits: When shards are written and what is held in memory.
            in_use: From a caller that already holds one.

        Raises:
            CacheError: There is none, it is damaged (names the file), or it has another key (names the difference).
        """
        folder = Path(folder)
        in_use = in_use or InUse(folder)
        manifest = Manifest.read(folder / MANIFEST)
        manifest.check(folder, key, num_examples)
        wrong = problems(folder, manifest)
        if wrong and not repair:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise CacheError(
                f"{next(iter(wrong.values()))}{more}; `kd-cache verify {folder}` checks all of it, teacher.cache=auto "
                "runs the teacher on these examples again and teacher.cache=refresh on all of them"
            )
        if wrong:
            manifest = drop_damaged(folder, say)
        return cls(folder, manifest, limits, in_use=in_use)

    @classmethod
    @contextlib.contextmanager
    def refreshing(
        cls, folder: Path, key: dict[str, Any], num_examples: int, storage: Storage = DEFAULT_STORAGE, *,
        teacher: str = "", data: str = "", limits: Limits = DEFAULT_LIMITS, say: Say = log.info,
        begin: Begin | None = None,
    ) -> Iterator[Self]:  # fmt: skip
        """Rebuild a cache while the old one in the folder, if any, stays valid until the new one is complete.

        Yields an empty cache, to be filled before the block ends; it then replaces the old one in one step. If the
        block fails, or the process is killed, the old one is unchanged. Arguments as in `create`.

        Raises:
            CacheError: Outputs are missing at the end, or the folder cannot be written.
        """
        folder = Path(folder)
        manifest = Manifest(key, num_examples, storage, teacher=teacher, data=data)
        with locked(folder, say):
            in_use = InUse(folder, make=True)
            sweep(folder)
            if begin is not None:
                begin(folder, manifest)
            manifest.write(folder / REFRESH)
            cache = cls(folder, manifest, limits, REFRESH, in_use=in_use)
            try:
                yield cache
                cache.flush()
                if not cache.complete:
                    raise CacheError(f"{folder} was not refreshed: {len(cache.missing())} examples are missing")
                replaced = shard_files(folder)
                os.replace(folder / REFRESH, folder / MANIFEST)
                cache._manifest_name = MANIFEST
                for path in replaced:
                    path.unlink(missing_ok=True)
            finally:
                sweep(folder)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open the same files, after writing what is pending."""
        self.flush()
        return {
            "folder": self.folder, "limits": self.limits, "name": self._manifest_name,
            "fingerprint": self.manifest.fingerprint,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the files. Their sizes are checked; the sender has checked the checksums."""
        in_use = InUse(state["folder"])
        manifest = Manifest.read(state["folder"] / state["name"])
        manifest.check_same(state["folder"], state["fingerprint"])
        self.__init__(  # type: ignore[misc]
            state["folder"], manifest, state["limits"], state["name"], in_use=in_use
        )

    # -- adding -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, say: Say = log.info, alone: bool = True) -> Iterator[None]:
        """Hold the lock, so that only this process runs the teacher on what is missing.

        First, shards of other processes are read and files of killed ones removed. At the end, also after an error,
        what was added is written.

        Args:
            say: Receives a line with the process that this one waits for.
            alone: False releases the lock at once, for processes that share the work and write at the same time.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(locked(self.folder, say))
            sweep(self.folder, refreshing=self._manifest_name == REFRESH)
            self._catch_up()
            if not alone:
                held.close()
            try:
                yield
            finally:
                self.flush()

    def add(
        self,
        index: Tensor,
        output: ModelOutput,
        mask: Tensor | None = None,
        seconds: float = 0.0,
        keep: Tensor | None = None,
    ) -> None:
        """Store the outputs for those examples of a batch that are missing.

        They can be looked up at once, with the values that the files will have (the storage's dtype and top-k). A shard
        is written when enough is pending (`Limits`).

        Args:
            index: The examples, `(B,)` int64.
            output: The teacher's output, on any device.
            mask: `(B, L)`, nonzero at real tokens; None for a network without one.
            seconds: How long the teacher predicted.
            keep: `(B, L)`, the kept rows of logits per token; None: those of all real tokens.

        Raises:
            CacheError: Outputs that are not finite, or of another shape than the first; an index outside 0..N-1; a full
                disk.
            ConfigError: `teacher.cache_top_k` does not fit the number of classes.
        """
        with torch.inference_mode(False), torch.no_grad():
            index, mask, keep = index.cpu(), _on_cpu(mask), _on_cpu(keep)
            specs = self.manifest.specs or specs_of(output, mask, self.manifest.storage, keep)
            check_shapes(specs, output, index, mask, keep)
            self._places.check_range(index.numpy())
            fresh = torch.from_numpy(self._places.fresh(index.numpy()))
            if len(fresh) == 0:
                return
            values = named(output)
            if len(fresh) < len(index):
                values = {
                    name: value.at(rows) if isinstance(value, SparseLogits) else value.index_select(0, rows)
                    for name, value in values.items() for rows in (fresh.to(value.device),)
                }  # fmt: skip
                index, mask, keep = index[fresh], *(None if x is None else x[fresh] for x in (mask, keep))
            tensors = encode_all(specs, values, index, mask, keep)
            if not self.manifest.specs:
                self.manifest.specs = specs
                self._prepare()
            segment = Segment.of(tensors)
            self._waiting.append(self._take_in(segment))
        self._waiting_bytes += segment.nbytes
        self._seconds += seconds
        overdue = time.monotonic() - self._written > self.limits.shard_seconds
        if overdue or self._waiting_bytes >= self.limits.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard.

        Raises:
            CacheError: The disk is full. What is already in files stays valid.
        """
        if not self._waiting:
            return
        with locked(self.folder):
            self._catch_up()
            keep = {n: self._places.segment[self._segments[n].index] == n for n in self._waiting}
            tensors = join(self.manifest.specs, [(self._segments[n], keep[n]) for n in self._waiting])
            if len(tensors["index"]):  # others may have written all of it meanwhile
                self._write_shard(tensors)
        for number in self._waiting:
            del self._segments[number]
        self._waiting, self._waiting_bytes, self._seconds = [], 0, 0.0
        self._written = time.monotonic()

    def _write_shard(self, tensors: dict[str, Tensor]) -> None:
        record = write_shard(self.folder, tensors, self.manifest.fingerprint)
        record = dataclasses.replace(record, seconds=self._seconds, run=self.run)
        manifest = dataclasses.replace(self.manifest, shards=[*self.manifest.shards, record])
        try:
            manifest.write(self.folder / self._manifest_name)
        except CacheError:
            (self.folder / record.file).unlink()
            raise
        self.manifest = manifest
        self._open_shards()

    def _catch_up(self) -> None:
        """Read what other processes have written since; the caller holds the lock."""
        manifest = Manifest.read(self.folder / self._manifest_name)
        manifest.check_same(self.folder, self.manifest.fingerprint)
        for record in manifest.shards:
            if record.file not in self._mapped and (wrong := shard_problem(self.folder, record)) is not None:
                raise CacheError(f"{wrong}; {remedy(self.folder)}")
        ours, self.manifest = self.manifest.specs, manifest
        if ours and manifest.specs and ours != manifest.specs:
            raise CacheError(
                f"{self.folder} holds {manifest.specs}, this teacher outputs {ours}; {remedy(self.folder)}"
            )
        if ours:
            manifest.specs = ours
            self._open_shards()
        else:
            self._prepare()


def _on_cpu(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.cpu().bool()
