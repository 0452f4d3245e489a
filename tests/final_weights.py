"""A callback that keeps what a training ends with, whatever look at validation was best."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch


class FinalWeights(L.Callback):
    """Writes each process's last weights as `final-RANK.pt` into the stage's folder."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        torch.save(
            {"step": trainer.global_step, "weights": pl_module.state_dict()}, folder / f"final-{trainer.global_rank}.pt"
        )
