"""An epoch with a cached teacher against the same student trained without a teacher: same batches, same trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import Measure, ratios
from benchmarks.task import (
    STUDENTS,
    cache_of,
    objective,
    optimizer,
    scheduler,
    silence,
    student,
    take_turns,
    train_ours,
)
from kd_lightning.tasks import Classification
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.training.distillation import DistillationModule, SupervisedModule

WARM, STEPS, ROUNDS = 10, 70, 11


def run() -> list[Measure]:
    """Return the ratio of the seconds, for each student."""
    silence()
    with tempfile.TemporaryDirectory() as folder:
        teacher = cache_of(FrozenTeacher(student(STUDENTS[0])), Path(folder))
        return [_one(name, teacher) for name in STUDENTS]


def _one(name: str, teacher: CachedTeacher) -> Measure:
    def distilled() -> float:
        module = DistillationModule(student(name), teacher, objective(), optimizer(), scheduler, task=Classification(2))
        return train_ours(module, WARM, STEPS, logging=True)

    def labels_only() -> float:
        module = SupervisedModule(student(name), optimizer(), scheduler, task=Classification(2))
        return train_ours(module, WARM, STEPS, logging=True)

    seconds = take_turns({"distilled": distilled, "labels only": labels_only}, ROUNDS)
    return Measure(f"{name}: distilled / labels only", ratios(*seconds.values()), "ratio", "<= 1.05")
