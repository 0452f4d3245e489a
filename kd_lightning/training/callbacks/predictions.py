"""What `kd-cli predict` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from kd_lightning.runtime.files import write_file


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict` says as JSON lines: the `index` of each example and its `prediction`, in order.

    Args:
        file: Where to.
    """

    def __init__(self, file: str) -> None:
        super().__init__("batch")
        self.file = Path(file)
        self._rows: list[dict[str, Any]] = []

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, batch_indices: Sequence[int] | None,
        batch: Any, batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Keep one batch's rows."""
        pairs = zip(batch["index"].tolist(), prediction.tolist(), strict=True)
        self._rows += [{"index": index, "prediction": row} for index, row in pairs]

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file, in the first process with what all of them said."""
        said: list[list[dict[str, Any]]] = [self._rows] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(said, self._rows)
        rows = {int(row["index"]): row for part in said for row in part}  # in order of the examples, each once
        if trainer.is_global_zero:
            write_file(self.file, "".join(f"{json.dumps(rows[index])}\n" for index in sorted(rows)))
        self._rows = []
