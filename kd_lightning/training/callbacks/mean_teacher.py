"""A callback that updates a teacher averaging its student's weights."""

from __future__ import annotations

from typing import Any

import lightning as L

from kd_lightning.teachers import EMATeacher
from kd_lightning.training.distillation import DistillationModule

_KEY = "mean_teacher"


class MeanTeacher(L.Callback):
    """Updates the `EMATeacher` of a `DistillationModule` after each step, and checkpoints it.

    Other teachers are not affected. With several processes each has the same average, since their
    students' weights are the same.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting at the trainer's step; give each process its own average.

        `ddp_spawn` passes tensors in shared memory. Lightning copies those of the module, but not the teacher's: all
        processes would update one average.
        """
        self._steps = trainer.global_step
        network = _teacher(pl_module).network
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.clone()
        if trainer.global_step == 0:
            _teacher(pl_module).restart(_module(pl_module).student)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update, unless gradients are still accumulated."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            _teacher(pl_module).update(_module(pl_module).student)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the average."""
        checkpoint[_KEY] = _teacher(pl_module).state_dict()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average."""
        _teacher(pl_module).load_state_dict(checkpoint[_KEY])


def _module(module: L.LightningModule) -> DistillationModule:
    assert isinstance(module, DistillationModule)
    return module


def _teacher(module: L.LightningModule) -> EMATeacher:
    teacher = _module(module).teacher
    assert isinstance(teacher, EMATeacher)
    return teacher
