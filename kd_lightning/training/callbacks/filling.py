"""Keeps a teacher cache consistent with the training that fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L


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
