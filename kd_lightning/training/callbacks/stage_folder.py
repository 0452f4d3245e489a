"""Writes a stage folder after a training with `kd-cli`, for the other commands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning.data.datamodule import IndexedData, Role
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.module import NetworkModule
from kd_lightning.training.stage import TrainingRecord, keep


class StageFolder(L.Callback):
    """Writes the network with its best weights as a stage folder, like `kd-train`.

    Args:
        folder: The stage's; `RUN/teacher` for instance.
        role: Whose inputs the network uses.
        network: How to rebuild your own network: `_target_` and its arguments.

    Raises:
        ConfigError: The folder holds a finished training; or there is no `ModelCheckpoint` to select the best weights.
    """

    def __init__(self, folder: str, role: Role = "student", network: dict[str, Any] | None = None) -> None:
        self.folder, self.role, self.network = Path(folder), role, network

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse before the training to overwrite a finished one."""
        if stage == "fit" and (self.folder / "stage.json").exists():
            raise ConfigError(f"{self.folder} holds a finished training: choose another folder, or remove it")
        if stage == "fit" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise ConfigError("StageFolder keeps the best weights: add a ModelCheckpoint to trainer.callbacks")
        self._started = time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the folder, in the first process."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        best = trainer.checkpoint_callback
        assert isinstance(pl_module, NetworkModule)
        assert isinstance(data, IndexedData)
        assert isinstance(best, ModelCheckpoint)
        settings = {"kd-cli": type(pl_module).__name__, "seed": pl_module.seed, "data": data.fingerprint}
        record = TrainingRecord(
            name=self.folder.name, folder=self.folder, settings=settings, network_settings=self.network or {},
            data=data.with_batches(), role=self.role,
        )  # fmt: skip
        seconds = time.monotonic() - self._started
        device = trainer.strategy.root_device
        keep(record, pl_module, Path(best.best_model_path), trainer.global_step, seconds, device)
