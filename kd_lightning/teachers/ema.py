"""A teacher that is the moving average of the student's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kd_lightning.models.adapt import unwrap
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.sharding import full
from kd_lightning.teachers.frozen import FrozenTeacher
from kd_lightning.types import Batch, ModelOutput


class EMATeacher(FrozenTeacher):
    r"""Mean teacher: the moving average of the student (Tarvainen & Valpola 2017, arXiv 1703.01780).

    After the student's t-th optimizer step, t = 1, 2, ...

    .. math:: \theta'_t = d_t \, \theta'_{t-1} + (1 - d_t) \, \theta_t, \quad d_t = \min(1 - 1/(t + 1), decay)

    from :math:`\theta'_0 = \theta_0`: the plain mean of all weights so far until `decay` is reached, so that the
    random initial weights soon lose their influence. Buffers (BatchNorm's statistics) are copied.

    Two deviations from the paper: the teacher runs in eval mode, without dropout, and on the same input as the
    student. It runs in float32: an average in 16 bits would not move.

    `update` is called by `kd_lightning.callbacks.MeanTeacher`, which also keeps the average in the checkpoint.

    Args:
        student: Where the average starts; it is copied.
        decay: d in [0, 1); 0.99 averages over the last hundred steps or so.
        features: As for `FrozenTeacher`.

    Raises:
        ConfigError: A decay outside [0, 1), or an unknown feature.
    """

    def __init__(self, student: nn.Module, decay: float = 0.99, features: Sequence[str] = ()) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"teacher.ema={decay} must be at least 0 and below 1")
        super().__init__(copy.deepcopy(unwrap(student)), features=features)
        self.decay, self.updates = decay, 0

    def forward(self, batch: Batch) -> ModelOutput:
        """Return the averaged network's output for the student's input, whatever other tokens the batch has."""
        return super().forward({name: value for name, value in batch.items() if not name.startswith("teacher_")})

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Add the student's current weights to the average."""
        self.updates += 1
        kept = min(1.0 - 1.0 / (self.updates + 1), self.decay)
        student = unwrap(student)
        for mean, weight in zip(self.network.parameters(), student.parameters(), strict=True):
            mean.lerp_(full(weight), 1.0 - kept)
        for buffer, value in zip(self.network.buffers(), student.buffers(), strict=True):
            buffer.copy_(value)

    def restart(self, student: nn.Module) -> None:
        """Restart from the student's current weights."""
        self.network.load_state_dict({name: full(value) for name, value in unwrap(student).state_dict().items()})
        self.updates = 0

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of updates, for `state_dict`."""
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of updates from a `state_dict`."""
        self.updates = int(state["updates"])
