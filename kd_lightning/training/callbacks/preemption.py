"""Saving at a step that all processes agree on when a signal says to stop."""

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
    """A `ResumeCheckpoint` that, told to stop, saves at the end of an optimizer step and ends the training.

    The signal's handler only notes it, since a handler that saves may interrupt a process in the middle of an exchange
    with the others, or of a logger's writing. After each optimizer step the processes tell each other what they noted,
    so that all save the same step: one number, and none where a process trains alone. Where a look at validation is
    due the training ends after it, as for any other checkpoint here; told during its last step it runs to its end.

    Args:
        path: The file, written beside itself and moved into place.
        every_n_steps: Optimizer steps from one checkpoint to the next.
        stage: What is being trained, for the line that says where it stopped.
    """

    def __init__(self, path: Path, every_n_steps: int, stage: str) -> None:
        super().__init__(path, every_n_steps)
        self.stage = stage
        self._watching = signals.watching()
        self._stopping = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Handle signals in a process that was spawned for this training, too, and keep Lightning from handling any.

        Its handler of SIGTERM waits for other processes, and the training that it ends leaves as if it were finished.
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
        """End the training where the last step was its last: only now are its metrics with the loggers."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._stopping:
            raise Interrupted(f"{self.stage} is saved at step {trainer.global_step} in {self.path}")

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether to save after this step, which every process asks at its end."""
        self._stopping = self._watching and trainer.global_step < trainer.max_steps and self._agreed(trainer)
        return self._stopping or super().is_due(trainer)

    def _agreed(self, trainer: L.Trainer) -> bool:
        """Return whether a process has been told to stop: what the exchange says, and nothing that came after it."""
        asked = signals.asked()
        if trainer.world_size == 1:
            return asked is not None
        noted = 0 if asked is None else 1 + signals.SIGNALS.index(asked)
        most = torch.tensor([noted], device=trainer.strategy.root_device)
        # Here a signal is likely to come: most of a fast step is waiting for the others.
        dist.all_reduce(most, dist.ReduceOp.MAX)
        number = int(most.item())
        if number:
            signals.ask(signals.SIGNALS[number - 1])
        return number > 0
