"""A callback that writes the predictions of `kd-cli predict`."""

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
    """Writes predictions as JSON lines: each example's `index` and `prediction`, in order.

    Args:
        file: The output file.
    """

    def __init__(self, file: str) -> None:
        super().__init__("batch")
        self.file = Path(file)
        self._rows: list[dict[str, Any]] = []

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, batch_indices: Sequence[int] | None,
        batch: Any, batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Collect one batch's rows."""
        pairs = zip(batch["index"].tolist(), prediction.tolist(), strict=True)
        self._rows += [{"index": index, "prediction": row} for index, row in pairs]

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the predictions of all processes, in the first one."""
        gathered: list[list[dict[str, Any]]] = [self._rows] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(gathered, self._rows)
        rows = {int(row["index"]): row for rows in gathered for row in rows}  # each example once
        if trainer.is_global_zero:
            write_file(self.file, "".join(f"{json.dumps(rows[index])}\n" for index in sorted(rows)))
        self._rows = []
