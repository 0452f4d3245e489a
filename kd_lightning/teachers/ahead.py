"""A teacher that runs on the next batch while the student trains on the current one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch

from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput

_OUTPUT = "teacher_output."  # networks are never given entries that begin with teacher_


class AheadTeacher(Teacher):
    """Runs a teacher one batch ahead on a GPU: on its own stream, or on a GPU of its own.

    Before `around(loader)` yields a batch of the loader (on the CPU), it launches the teacher on the next one. Each
    batch carries its teacher output, which `__call__` returns. For other batches (validation) `__call__` runs the
    teacher. If the teacher is on a CPU, `around` returns the loader: there is nothing to overlap with.

    The order and number of batches do not change, so a resumed trainer continues with the same batch.

    Args:
        teacher: One that draws no random numbers, such as `FrozenTeacher`.
        device: The teacher's own GPU; None: the student's.
    """

    def __init__(self, teacher: Teacher, device: torch.device | None = None) -> None:
        self.teacher, self.own_device = teacher, device
        self.device = device or torch.device("cpu")

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the teacher output that the batch carries, or run the teacher."""
        if found := {key.removeprefix(_OUTPUT): value for key, value in batch.items() if key.startswith(_OUTPUT)}:
            sparse: Any = found.pop("sparse", None)
            return ModelOutput(found.pop("logits"), found, sparse)
        if self.own_device is None:
            return self.teacher(batch)
        here = batch["index"].device
        output = self.teacher({key: value.to(self.device) for key, value in batch.items()})
        features = {name: value.to(here) for name, value in output.features.items()}
        return ModelOutput(output.logits.to(here), features, output.sparse and output.sparse.to(here))

    def to(self, device: torch.device) -> Self:
        """Move the teacher to a device, unless it has one of its own."""
        self.device = self.own_device or device
        self.teacher = self.teacher.to(self.device)
        return self

    def flush(self) -> None:
        """Flush the teacher."""
        self.teacher.flush()

    def around(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """Return the loader's batches with their teacher outputs; call it after `to`."""
        return loader if self.device.type == "cpu" else _Ahead(loader, self.teacher, self.device)


class _Ahead:
    """The batches of a loader, each with the output of a teacher that runs one batch ahead."""

    def __init__(self, loader: Iterable[Batch], teacher: Teacher, device: torch.device) -> None:
        self.loader, self.teacher, self.device = loader, teacher, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.sampler = getattr(loader, "sampler", None)  # Lightning sets its epoch

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return self._with_outputs(iter(self.loader))  # created now: the iterator fixes the order of the epoch

    def _with_outputs(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the weights have been copied
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
            output = self.teacher(moved)
            return batch, output, None if self.stream is None else self.stream.record_event()

    def _collect(self, batch: Batch, output: ModelOutput, done: Any) -> Batch:
        entries: dict[str, Any] = {"logits": output.logits, **output.features}
        tensors = list(entries.values())
        if output.sparse is not None:
            entries["sparse"] = output.sparse
            tensors += [output.sparse.values, output.sparse.ids, output.sparse.rest]
        if done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for value in tensors:  # so that their memory is not reused before the student's step is done
                value.record_stream(current)
        return {**batch, **{_OUTPUT + name: value for name, value in entries.items()}}
