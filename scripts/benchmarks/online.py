"""Training with the teacher running in every step against its forward pass and the student's step done by hand.

MiniLM-L6 in float32 on both sides, in eval mode under `inference_mode`; the same batches of 32 sentences. The teacher
in this machine's default precision is reported beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import Measure, ratios
from benchmarks.task import (
    STUDENTS,
    objective,
    optimizer,
    scheduler,
    silence,
    student,
    take_turns,
    teacher_network,
    train_by_hand,
    train_ours,
)
from kd_lightning.config.resolvers import fast_inference
from kd_lightning.tasks import Classification
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.types import Batch

WARM, STEPS = 3, 33


def run() -> list[Measure]:
    """Return the ratio of the seconds, for each student."""
    silence()
    return [measure for name in STUDENTS for measure in _one(name)]


def _one(name: str) -> list[Measure]:
    network = teacher_network().requires_grad_(False)

    def ask(batch: Batch) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.clone()

    def ours(precision: str) -> float:
        teacher = FrozenTeacher(network, precision)  # type: ignore[arg-type]
        module = DistillationModule(student(name), teacher, objective(), optimizer(), scheduler, task=Classification(2))
        return train_ours(module, WARM, STEPS, logging=True)

    fast = fast_inference()
    work = {"ours": lambda: ours("float32"), "by hand": lambda: train_by_hand(student(name), ask, WARM, STEPS)}
    if fast != "float32":
        work[fast] = lambda: ours(fast)
    seconds = take_turns(work)
    measures = [Measure(f"{name}: ours / by hand", ratios(seconds["ours"], seconds["by hand"]), "ratio", "<= 1.03")]
    if fast != "float32":
        note = "the default teacher.precision on this machine against float32 by hand"
        measures.append(
            Measure(f"{name}: ours, {fast} / by hand", ratios(seconds[fast], seconds["by hand"]), "ratio", None, note)
        )
    return measures
