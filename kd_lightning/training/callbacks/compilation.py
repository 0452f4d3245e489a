"""What compiles networks where no one but the trainer sees them before the training."""

from __future__ import annotations

import lightning as L
import torch

from kd_lightning.models.cohort import Cohort
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.module import NetworkModule


class Compilation(L.Callback):
    """Has `torch.compile` compile the network that is trained, and its peers, for batches of any shape."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compile in place, so that the names of the weights stay, before a batch runs through the network."""
        if stage != "fit":
            return
        assert isinstance(pl_module, NetworkModule)
        torch._functorch.config.donated_buffer = False  # else no backward pass a term, to compare their gradients
        student = pl_module.student if isinstance(pl_module, DistillationModule) else None
        for network in student.peers if isinstance(student, Cohort) else [pl_module.trained]:
            network.compile(dynamic=True)
