"""Checkpoints for resuming after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from kd_lightning.runtime.files import replacing
from kd_lightning.training.callbacks.checkpoints import SealedCheckpoints


class ResumeCheckpoint(Checkpoint):
    """Saves the whole state of a training in one file, every few optimizer steps.

    Lightning's `ModelCheckpoint` saves before the validation of the same step; a training resumed from there skips
    that validation, so it may select other weights. Here such a checkpoint is saved after the validation, and after the
    callbacks listed before this one, which select the best weights.

    Args:
        path: The file, written beside itself and moved into place.
        every_n_steps: Optimizer steps from one checkpoint to the next.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self._step = 0
        self._waiting = False
        self._row_due = False  # the row of the last checkpoint's step is logged after it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting at the step where training resumes."""
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save the last step's log row with its checkpoint."""
        if self._row_due and trainer.is_global_zero and isinstance(trainer.strategy.checkpoint_io, SealedCheckpoints):
            trainer.strategy.checkpoint_io.keep_logs(self.path.parent)
        self._row_due = False

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether to save after this optimizer step; called once after each."""
        return trainer.global_step % self.every_n_steps == 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows."""
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        if not self.is_due(trainer):
            return
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if trainer.enable_validation and trainer.val_check_batch and batches % trainer.val_check_batch == 0:
            self._waiting = True
        else:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a checkpoint that waited for this validation."""
        if self._waiting and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._waiting, self._row_due = False, True
        for logger in trainer.loggers:  # rows before the checkpoint are not logged again
            logger.save()
        if isinstance(trainer.strategy.checkpoint_io, SealedCheckpoints):  # which replaces the file itself
            trainer.save_checkpoint(self.path, weights_only=False)
            return
        if trainer.world_size == 1:
            with replacing(self.path) as temporary:
                trainer.save_checkpoint(temporary, weights_only=False)
            return
        whole = self.path.with_name(f".{self.path.name}.all")  # one name on every rank: they save together
        trainer.save_checkpoint(whole, weights_only=False)
        if trainer.is_global_zero:
            whole.replace(self.path)
        trainer.strategy.barrier()
