"""The teacher that has answered: it runs for what its cache lacks, and everything else is looked up by `index`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.fill import attention_mask, check_repeatable, check_room, estimate
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput


class CachedTeacher(Teacher):
    """Answers from a cache of the teacher's outputs.

    While the cache lacks answers the teacher itself is asked, a whole batch at a time, and its answers are kept: the
    first epoch of a training fills the cache as it goes, without a pass of its own. What a training reads is what is
    stored, in the storage's precision, in the first epoch too. No lock is held meanwhile: a second process that fills
    the same cache reads what this one has written so far, a shard every few seconds.

    With float32 storage the logits are, bit by bit, what the teacher said when it was asked. A running teacher, asked
    in every epoch's own batches, differs from itself by rounding: by 1e-5 of the largest logit in float32, 2% in bf16
    and 20% in int8-dynamic, whose scales are the batch's (bounds tested in tests/teachers/test_frozen.py).

    Args:
        cache: Complete, or to be filled.
        teacher: Asked for what is missing; None where the cache must have everything.
        lengths: The teacher's tokens of every example, `(N,)`, to estimate from how large the cache becomes; None takes
            the first batch's for all.
        say: Told that estimate.
        features: Which of the stored features to answer with; None: all.

    >>> import tempfile
    >>> from torch import nn
    >>> import kd_lightning as kd
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> cache = kd.TeacherCache.create(f"{tempfile.mkdtemp()}/cache", {"teacher": "a name of mine"}, num_examples=2)
    >>> teacher = CachedTeacher(cache, kd.FrozenTeacher(network))
    >>> teacher({"pixel_values": torch.ones(2, 1, 2, 2), "index": torch.tensor([0, 1])}).logits.shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        cache: TeacherCache,
        teacher: Teacher | None = None,
        lengths: Tensor | None = None,
        say: Callable[[str], None] = lambda line: None,
        features: Sequence[str] | None = None,
    ) -> None:
        self.cache, self.teacher, self.lengths, self.say, self.features = cache, teacher, lengths, say, features

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the stored answers to the batch's examples, after asking for those that are missing.

        Raises:
            CacheError: Answers are missing and there is no teacher to ask.
        """
        index, mask = batch["index"], attention_mask(batch)
        if not self.cache.complete and not bool(self.cache.known(index).all()):
            self._ask(batch, index, mask)
        return self.cache.lookup(index, mask, self.features, batch.get("keep"))

    def _ask(self, batch: Batch, index: Tensor, mask: Tensor | None) -> None:
        if self.teacher is None:
            raise CacheError(f"{self.cache.folder} lacks answers to this batch, and there is no teacher to ask")
        started = time.monotonic()
        if self.cache.manifest.specs:
            output = self.teacher(batch)
        else:
            output = check_repeatable(self.teacher, batch)
            size = estimate(self.cache, output, mask, self.lengths, batch.get("keep"))
            self.say(f"teacher  answers are kept as they are asked for: {size}, in {self.cache.folder}")
            check_room(self.cache, size)
        self.cache.add(index, output, mask, time.monotonic() - started, batch.get("keep"))

    def flush(self) -> None:
        """Write what was asked for since the last shard: before a checkpoint, and when a training ends."""
        self.cache.flush()

    def to(self, device: torch.device) -> Self:
        """Answer on a device from now on."""
        self.cache.to(device)
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Give a spawned process the cache by its path; what this one says stays here."""
        return {
            "cache": self.cache, "teacher": self.teacher, "lengths": self.lengths, "features": self.features,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the cache in the new process."""
        self.__init__(**state)  # type: ignore[misc]
