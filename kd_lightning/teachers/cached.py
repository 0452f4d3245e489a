"""The teacher that has answered: it runs for what its cache lacks, and everything else is looked up by `index`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Self

import torch

from kd_lightning.cache.fill import attention_mask, check_repeatable, check_room, estimate
from kd_lightning.cache.store import TeacherCache
from kd_lightning.errors import CacheError
from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput


class CachedTeacher:
    """Answers from a cache of the teacher's outputs.

    While the cache lacks answers the teacher itself is asked, a whole batch at a time, and its answers are kept: the
    first epoch of a training fills the cache as it goes, without a pass of its own. What a training reads is what is
    stored, in the storage's precision, in the first epoch too. Meanwhile the cache's lock is held, so that a second
    process waits instead of asking the same; `close` releases it.

    Args:
        cache: Complete, or to be filled.
        teacher: Asked for what is missing; None where the cache must have everything.
        say: Told how large the cache becomes, and whom this process waits for.
    """

    def __init__(
        self, cache: TeacherCache, teacher: Teacher | None = None, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.cache, self.teacher, self.say = cache, teacher, say
        self._lock = contextlib.ExitStack()
        self._filling = False

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the stored answers to the batch's examples, after asking for those that are missing.

        Raises:
            CacheError: Answers are missing and there is no teacher to ask.
        """
        index, mask = batch["index"], attention_mask(batch)
        if not self.cache.complete and not bool(self.cache.known(index).all()):
            self._ask(batch)
        return self.cache.lookup(index, mask)

    def _ask(self, batch: Batch) -> None:
        if self.teacher is None:
            raise CacheError(f"{self.cache.folder} lacks answers to this batch, and there is no teacher to ask")
        if not self._filling:
            self._lock.enter_context(self.cache.writing(self.say))
            self._filling = True
        index, mask = batch["index"], attention_mask(batch)
        if not bool(self.cache.known(index).all()):  # another process may have answered while this one waited
            started = time.monotonic()
            if self.cache.manifest.specs:
                output = self.teacher(batch)
            else:
                output = check_repeatable(self.teacher, batch)
                size = estimate(self.cache, output, mask)
                self.say(f"teacher  answers are kept as they are asked for: {size}, in {self.cache.folder}")
                check_room(self.cache, size)
            self.cache.add(index, output, mask, time.monotonic() - started)
        if self.cache.complete:
            self.close()

    def close(self) -> None:
        """Write what was asked for since the last shard, and let other processes go on."""
        self._lock.close()
        self._filling = False

    def to(self, device: torch.device) -> Self:
        """Answer on a device from now on."""
        self.cache.to(device)
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Give a spawned process the cache by its path, and no lock."""
        return {"cache": self.cache, "teacher": self.teacher}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the cache in the new process."""
        self.__init__(**state)  # type: ignore[misc]
