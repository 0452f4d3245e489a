"""Keeps a teacher cache consistent with the training that fills it, and counts its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

from kd_lightning.teachers.clock import PREDICTING


class CacheFilling(L.Callback):
    """Writes pending teacher outputs before checkpoints, and completes the cache after an epoch.

    A resumed training starts from its checkpoint: earlier outputs are on disk, and later ones are computed again in the
    same batches, so that the numbers are equal. Once the cache is complete, no step checks for missing outputs.

    Args:
        flush: Writes pending outputs (`Teacher.flush`).
        complete: Runs the teacher on examples in no training batch (the test split), if any.
    """

    def __init__(self, flush: Callable[[], None], complete: Callable[[], None]) -> None:
        self.flush, self.complete = flush, complete

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the outputs that were used up to this checkpoint."""
        self.flush()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last outputs."""
        self.flush()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the cache."""
        self.complete()


class TeacherTime(L.Callback):
    """Notes in a training's record for how long teachers predicted meanwhile, over all attempts.

    Args:
        notes: What the record says; it gets `teacher_seconds`.
        earlier: What they took for this training before it began.
    """

    def __init__(self, notes: dict[str, Any], earlier: float = 0.0) -> None:
        self.notes, self.earlier, self.begun = notes, earlier, 0.0

    @property
    def seconds(self) -> float:
        """Their seconds so far, of this attempt and of those that it resumes."""
        return self.earlier + PREDICTING.seconds - self.begun

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self.begun = PREDICTING.seconds

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the note."""
        self.notes["teacher_seconds"] = self.seconds

    def state_dict(self) -> dict[str, Any]:
        """Return what the training goes on counting from."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.earlier = float(state_dict["seconds"])
