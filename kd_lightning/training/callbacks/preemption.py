"""Saves at a step that all processes agree on when a signal to stop arrives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from kd_lightning.runtime import signals
from kd_lightning.runtime.errors import Interrupted
from kd_lightning.training.callbacks.resume import ResumeCheckpoint


class Preemption(ResumeCheckpoint):
    """A `ResumeCheckpoint` that saves and ends the training after a signal to stop.

    The signal's handler only records it, since saving in a handler may interrupt a collective operation or a logger's
    writing. After each optimizer step the processes exchange what they recorded (one number; nothing for a single
    process), so that all save the same step. If a validation is due, the training ends after it, as for any other
    checkpoint; a signal during the last step has no effect.

    Args:
        path: The file, written beside itself and moved into place.
        every_n_steps: Optimizer steps from one checkpoint to the next.
        stage: The stage's name, for messages.
    """

    def __init__(self, path: Path, every_n_steps: int, stage: str) -> None:
        super().__init__(path, every_n_steps)
        self.stage = stage
        self._watching = signals.watching()
        self._stopping = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install handlers in spawned processes too, and disable Lightning's.

        Its SIGTERM handler waits for other processes, and ends the training as if it were finished.
        """
        if not self._watching:
            return
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if not signals.watching():
            signals.hold()
            signals.watch()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the training after its last step, when its metrics have been logged."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._stopping:
            raise Interrupted(f"{self.stage} is saved at step {trainer.global_step} in {self.path}")

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether to save after this step; every process calls it."""
        self._stopping = self._watching and trainer.global_step < trainer.max_steps and self._agreed(trainer)
        return self._stopping or super().is_due(trainer)

    def _agreed(self, trainer: L.Trainer) -> bool:
        """Return whether any process received a signal before the exchange."""
        received = signals.received()
        if trainer.world_size == 1:
            return received is not None
        noted = 0 if received is None else 1 + signals.SIGNALS.index(received)
        most = torch.tensor([noted], device=trainer.strategy.root_device)
        # Signals often arrive here: most of a fast step is waiting for the others.
        dist.all_reduce(most, dist.ReduceOp.MAX)
        number = int(most.item())
        if number:
            signals.receive(signals.SIGNALS[number - 1])
        return number > 0
