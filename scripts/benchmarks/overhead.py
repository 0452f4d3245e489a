"""Our training step under Lightning, logging on, against a minimal hand-written loop of the same math and batches.

Both look the teacher's logits up in a table; the rest of the step is the student's. Ours has the pipeline's loggers and
callbacks. Batches of 32 sentences, AdamW, clipping and a schedule on both sides.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.common import Measure, ratios
from benchmarks.task import (
    STUDENTS,
    cache_of,
    objective,
    optimizer,
    reviews,
    scheduler,
    silence,
    student,
    take_turns,
    train_by_hand,
    train_ours,
)
from kd_lightning.tasks import Classification
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.training.distillation import DistillationModule

WARM, STEPS, ROUNDS = 10, 70, 11


def run() -> list[Measure]:
    """Return the ratio of the seconds of a step, for each student."""
    silence()
    with tempfile.TemporaryDirectory() as folder:
        # Any network will do for a teacher here: what it said costs nothing to look up.
        teacher = cache_of(FrozenTeacher(student(STUDENTS[0])), Path(folder))
        return [measure for name in STUDENTS for measure in _one(name, teacher)]


def _one(name: str, teacher: CachedTeacher) -> list[Measure]:
    table = teacher.cache.lookup(torch.arange(reviews().num_examples)).logits

    def ours() -> float:
        module = DistillationModule(student(name), teacher, objective(), optimizer(), scheduler, task=Classification(2))
        return train_ours(module, WARM, STEPS, logging=True)

    def by_hand() -> float:
        return train_by_hand(student(name), lambda batch: table[batch["index"]], WARM, STEPS)

    seconds = take_turns({"ours": ours, "by hand": by_hand}, ROUNDS)
    steps = STEPS - WARM
    return [
        Measure(f"{name}: ours / by hand", ratios(seconds["ours"], seconds["by hand"]), "ratio", "<= 1.03"),
        Measure(f"{name}: ours, a step", [1000 * value / steps for value in seconds["ours"]], "ms"),
    ]
