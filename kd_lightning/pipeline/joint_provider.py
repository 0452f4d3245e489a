"""The teachers of several tasks, as one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from kd_lightning.pipeline.teacher_loading import LoadedTeacher
from kd_lightning.pipeline.teacher_provider import TeacherProvider
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.teachers import MultiTaskTeacher, SideBySide, Teacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kd_lightning.data import MultiTaskData
    from kd_lightning.teachers.cache.store import TeacherCache


class JointProvider:
    """Gives the outputs of each task's own teacher, put side by side.

    Args:
        providers: Each task's, by its name.
        data: The data of all tasks.
    """

    def __init__(self, providers: Mapping[str, TeacherProvider], data: MultiTaskData) -> None:
        self.providers, self.data = dict(providers), data

    @cached_property
    def loaded(self) -> LoadedTeacher:
        """All teachers as one whose outputs stand side by side."""
        members = [provider.loaded for provider in self.providers.values()]
        title = ", ".join(f"{name} {member.title}" for name, member in zip(self.providers, members, strict=True))
        fingerprint = digest([member.fingerprint for member in members])
        return LoadedTeacher(SideBySide([member.network for member in members]), fingerprint, title, None, members)

    def forget(self) -> None:
        """Read the teachers again when they are needed next."""
        vars(self).pop("loaded", None)
        for provider in self.providers.values():
            provider.forget()

    def check(self, teachers: Sequence[tuple[nn.Module, LoadedTeacher | None]]) -> Teacher:
        """Refuse before any training what cannot be kept or predicted; see `TeacherProvider.check`."""
        given = zip(self.providers.values(), teachers, strict=True)
        return self._joined([provider.check(network, loaded) for provider, (network, loaded) in given])

    def teacher(self) -> Teacher:
        """Return the teacher that a training calls."""
        return self._joined([provider.teacher() for provider in self.providers.values()])

    def complete(self, share: tuple[int, int] = (0, 1)) -> None:
        """Have each teacher predict whatever its cache lacks, or one of several shares of it."""
        for provider in self.providers.values():
            provider.complete(share)

    def caches(self) -> list[TeacherCache]:
        """Return all teachers' caches."""
        return [cache for provider in self.providers.values() for cache in provider.caches()]

    def stored(self) -> dict[Path, int]:
        """Return how many outputs are stored for use, by the cache; see `TeacherProvider.stored`."""
        return {place: known for one in self.providers.values() for place, known in one.stored().items()}

    @property
    def reads_other_tokens(self) -> bool:
        """True where the teachers have different tokenizers, so that no batch holds what each of them reads."""
        return len({data.teacher_key.get("tokenizer") for data in self.data.tasks.values()}) > 1

    def _joined(self, teachers: Sequence[Teacher]) -> MultiTaskTeacher:
        return MultiTaskTeacher(teachers, list(self.data.task.spans.values()), self.data.firsts)
