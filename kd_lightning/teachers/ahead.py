"""The teacher that answers the next batch while the student trains on this one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch

from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput

_ANSWER = "teacher_answer."  # no network is ever given entries that begin with teacher_


class AheadTeacher(Teacher):
    """Runs a teacher one batch ahead on a GPU: on a stream of its own, or on another GPU than the student's.

    Before `around(loader)` hands out a batch of the loader (on the CPU) it has launched the teacher on the one after;
    each batch carries its answer, which `__call__` returns. One that did not come that way (validation) is answered
    when asked for. Where the teacher is on a CPU, `around` returns the loader: there is nothing to overlap with.

    Order and number of the batches stay as they are, so a position that the trainer counts leads to the same batch
    after a resume.

    Args:
        teacher: Answers without drawing random numbers, such as `FrozenTeacher`.
        device: The teacher's own GPU; by default it goes where the student is.
    """

    def __init__(self, teacher: Teacher, device: torch.device | None = None) -> None:
        self.teacher, self.own_device = teacher, device
        self.device = device or torch.device("cpu")

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the answer that the batch carries, or ask the teacher now."""
        if found := {key.removeprefix(_ANSWER): value for key, value in batch.items() if key.startswith(_ANSWER)}:
            return ModelOutput(found.pop("logits"), found)
        if self.own_device is None:
            return self.teacher(batch)
        here = batch["index"].device
        said = self.teacher({key: value.to(self.device) for key, value in batch.items()})
        return ModelOutput(said.logits.to(here), {name: value.to(here) for name, value in said.features.items()})

    def to(self, device: torch.device) -> Self:
        """Move the teacher to a device, unless it has one of its own."""
        self.device = self.own_device or device
        self.teacher = self.teacher.to(self.device)
        return self

    def flush(self) -> None:
        """Have the teacher write what it has not written yet."""
        self.teacher.flush()

    def around(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader's batches with their answers; call it after `to`."""
        return loader if self.device.type == "cpu" else _Ahead(loader, self.teacher, self.device)


class _Ahead:
    """The batches of a loader, each with the answer of a teacher that is one batch ahead."""

    def __init__(self, loader: Iterable[Batch], teacher: Teacher, device: torch.device) -> None:
        self.loader, self.teacher, self.device = loader, teacher, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.sampler = getattr(loader, "sampler", None)  # Lightning tells it the epoch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return self._answered(iter(self.loader))  # made now: the order of an epoch is settled with the iterator

    def _answered(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the weights are there
        waiting: tuple[Batch, ModelOutput, Any] | None = None
        for batch in batches:
            ready, waiting = waiting, self._launch(batch)
            if ready is not None:
                yield self._collect(*ready)
        if waiting is not None:
            yield self._collect(*waiting)

    def _launch(self, batch: Batch) -> tuple[Batch, ModelOutput, Any]:
        with torch.cuda.stream(self.stream):  # None: does nothing
            moved = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            answer = self.teacher(moved)
            return batch, answer, None if self.stream is None else self.stream.record_event()

    def _collect(self, batch: Batch, answer: ModelOutput, done: Any) -> Batch:
        entries = {"logits": answer.logits, **answer.features}
        if done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for value in entries.values():  # their memory is not reused before the student's step has read it
                value.record_stream(current)
        return {**batch, **{_ANSWER + name: value for name, value in entries.items()}}
