"""A callback that compiles networks, for trainers without our pipeline."""

from __future__ import annotations

import lightning as L
import torch

from kd_lightning.models.cohort import Cohort
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.module import NetworkModule


class Compilation(L.Callback):
    """Compiles the trained network, and its peers, with `torch.compile` for batches of any shape."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compile in place, so that the names of the weights stay, before a batch runs through the network."""
        if stage != "fit":
            return
        assert isinstance(pl_module, NetworkModule)
        torch._functorch.config.donated_buffer = False  # required for a backward pass per term
        student = pl_module.student if isinstance(pl_module, DistillationModule) else None
        for network in student.peers if isinstance(student, Cohort) else [pl_module.trained]:
            network.compile(dynamic=True)
