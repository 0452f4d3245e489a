"""The teacher that runs: a frozen network, asked batch by batch."""

from __future__ import annotations

import contextlib
from typing import Protocol, Self

import torch
from torch import nn

from kd_lightning.models.adapt import run_network
from kd_lightning.types import Batch, ModelOutput

_PREFIX = "teacher_"


class Teacher(Protocol):
    """What a distillation asks of a teacher: an answer to a batch, without a gradient, and to sit on a device."""

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the teacher's output for the batch."""
        ...

    def to(self, device: torch.device) -> Teacher:
        """Move to a device."""
        ...


class FrozenTeacher(nn.Module):
    """A network that is only ever asked: eval mode for good, no gradients, forward under `inference_mode`.

    The module that distils keeps it outside its own module tree, so it is in no optimizer, no DDP wrapper and no
    checkpoint. Where the batch has entries of its own for the teacher (`teacher_input_ids`, from another tokenizer),
    it reads those.

    Args:
        network: Any network; its parameters are frozen in place.
        precision: `bf16-mixed` to answer under bfloat16 autocast, whatever precision the student trains in; None
            leaves that to the caller.
    """

    def __init__(self, network: nn.Module, precision: str | None = None) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.precision = precision
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked: a teacher's dropout and BatchNorm never wake up."""
        return super().train(False)

    def forward(self, batch: Batch) -> ModelOutput:
        """Return the network's output, free of any graph."""
        own = {key.removeprefix(_PREFIX): value for key, value in batch.items() if key.startswith(_PREFIX)}
        if own:
            batch = own
        with torch.inference_mode(), self._autocast(next(iter(batch.values())).device.type):
            output = run_network(self.network, batch)
        # A clone is an ordinary tensor: autograd refuses to save inference tensors for a loss's backward pass.
        return ModelOutput(output.logits.clone(), {name: value.clone() for name, value in output.features.items()})

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[object]:
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16-mixed")
