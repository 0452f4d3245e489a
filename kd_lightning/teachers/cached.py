"""A teacher with cached outputs by `index`, which runs only on examples that the cache lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kd_lightning.runtime.console import Pace
from kd_lightning.runtime.errors import CacheError
from kd_lightning.teachers.cache.fill import attention_mask, check_repeatable, check_room, estimate, stored_rows
from kd_lightning.teachers.cache.outputs import Storage, specs_of
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.teachers.frozen import Teacher, WrappedTeacher
from kd_lightning.types import Batch, ModelOutput, SparseLogits


class StoredForm(WrappedTeacher):
    """Gives another teacher's outputs in the form in which a cache returns them.

    Args:
        inner: The other teacher.
        storage: How its outputs are to be stored.
    """

    def __init__(self, inner: Teacher, storage: Storage) -> None:
        super().__init__(inner)
        self.storage = storage

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the other teacher's output, with sparse logits where they are read back so."""
        output = self.inner(batch)
        spec = specs_of(output, attention_mask(batch), self.storage, stored_rows(batch))[0]
        if output.sparse is not None or not spec.sparse or spec.top_k is None:
            return output
        return ModelOutput(output.logits[..., :0], output.features, SparseLogits.of(output.logits, spec.top_k))


class CachedTeacher(Teacher):
    """Returns teacher outputs from a cache.

    If the cache lacks an example of a batch, the teacher runs on the whole batch and its outputs are stored: the first
    epoch of a training fills the cache, without a separate pass. Training uses the stored values, in the storage's
    precision, in the first epoch too. No lock is held meanwhile: a second process that fills the same cache reads what
    this one has written, a shard every few seconds.

    With float32 storage, the logits equal the teacher's output bit by bit. A running teacher, which sees each epoch's
    own batches, differs from itself by rounding: by 1e-5 of the largest logit in float32, 2% in bf16 and 20% in
    int8-dynamic, whose scales depend on the batch (bounds tested in tests/teachers/test_frozen.py).

    Args:
        cache: Complete, or to be filled.
        teacher: Runs on missing examples; None if the cache must be complete.
        lengths: The teacher's tokens of every example, `(N,)`, to estimate the size of the cache; None uses the first
            batch's.
        say: Receives that estimate, and how far it is filled.
        features: The stored features to return; None: all.

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
        self._pace: Pace | None = None

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the stored outputs for the batch, after running the teacher if some are missing.

        Raises:
            CacheError: Outputs are missing and there is no teacher.
        """
        index, mask = batch["index"], attention_mask(batch)
        with torch.autocast(index.device.type, enabled=False):  # of a training in 16 bits; the teacher has its own
            if not self.cache.complete and not bool(self.cache.known(index).all()):
                self._fill(batch, index, mask)
            return self.cache.lookup(index, mask, self.features, stored_rows(batch))

    def _fill(self, batch: Batch, index: Tensor, mask: Tensor | None) -> None:
        if self.teacher is None:
            raise CacheError(f"{self.cache.folder} lacks outputs for this batch, and there is no teacher to run")
        before = PREDICTING.seconds
        if self.cache.manifest.specs:
            output = self.teacher(batch)
        else:
            output = check_repeatable(self.teacher, batch)
            size = estimate(self.cache, output, mask, self.lengths, stored_rows(batch))
            self.say(f"teacher  outputs are cached as they are computed: {size}, in {self.cache.folder}")
            check_room(self.cache, size)
        self.cache.add(index, output, mask, PREDICTING.seconds - before, stored_rows(batch))
        if self._pace is None:
            self._pace = Pace(self.cache.stored)
        elif self._pace.due:
            number = self.cache.manifest.num_examples
            left = self._pace.left(self.cache.stored, number)
            self.say(f"teacher  outputs of {self.cache.stored:,} of {number:,} examples are cached, {left}")

    def flush(self) -> None:
        """Write what was added since the last shard: before a checkpoint, and when training ends."""
        self.cache.flush()

    def to(self, device: torch.device) -> Self:
        """Return outputs on a device from now on."""
        self.cache.to(device)
        if self.teacher is not None:
            self.teacher.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the cache by its path, and leave out `say`."""
        return {
            "cache": self.cache, "teacher": self.teacher, "lengths": self.lengths, "features": self.features,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the cache in the new process."""
        self.__init__(**state)  # type: ignore[misc]
