"""Several teachers, one for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput


class MultiTaskTeacher(Teacher):
    """Runs each teacher on the examples of its task and writes its logits to the columns of that task.

    Other columns are 0. Each teacher may run or use its own cache. Features are not returned: the teachers' may differ
    in shape.

    Args:
        teachers: One per task, numbered like the batch's `task`.
        spans: Each task's columns.
        firsts: The `index` of each task's first example; its teacher counts them from 0.
    """

    def __init__(self, teachers: Sequence[Teacher], spans: Sequence[range], firsts: Sequence[int]) -> None:
        self.teachers, self.spans, self.firsts = list(teachers), list(spans), list(firsts)

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return `(B, C_1 + ... + C_K)` logits in float32."""
        task = batch["task"]
        logits = torch.zeros(len(task), self.spans[-1].stop, device=task.device)
        for number, (teacher, span, first) in enumerate(zip(self.teachers, self.spans, self.firsts, strict=True)):
            rows = (task == number).nonzero().squeeze(1)
            if len(rows):
                own = {name: value[rows] for name, value in batch.items() if name != "task"}
                own["index"] = own["index"] - first
                logits[rows, span.start : span.stop] = teacher(own).logits.float()
        return ModelOutput(logits)

    def to(self, device: torch.device) -> Self:
        """Move every teacher to a device."""
        self.teachers = [teacher.to(device) for teacher in self.teachers]
        return self

    def flush(self) -> None:
        """Flush every teacher."""
        for teacher in self.teachers:
            teacher.flush()


class SideBySide(nn.Module):
    """Several networks on the same batch with concatenated logits: for code that measures one network.

    Args:
        networks: At least one.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Run every network on the batch."""
        return ModelOutput(torch.cat([run_network(network, batch).logits.float() for network in self.networks], dim=1))
