"""What keeps a cache that a training fills in step with the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L


class CacheFilling(L.Callback):
    """Writes the answers that were asked for before every checkpoint, and completes the cache after the first epoch.

    A killed training goes on from its checkpoint; answers that came after it are asked for again in the same batches,
    and those from before it are on disk, so that both read the same numbers. Once the cache is complete, no step looks
    for what is missing.

    Args:
        flush: Writes what was asked for (`Teacher.flush`).
        complete: Has the teacher answer what no training batch asks about (the test split), if anything.
    """

    def __init__(self, flush: Callable[[], None], complete: Callable[[], None]) -> None:
        self.flush, self.complete = flush, complete

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the answers that this checkpoint's training has read."""
        self.flush()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last answers."""
        self.flush()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the cache."""
        self.complete()
