"""A graph in PyTorch's own archive (`torch.export`), which loads with torch alone. There is no TorchScript in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_lightning.export.formats import Written
from kd_lightning.export.graph import DTYPES, trace

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.runs import TrainedModel

FILE = "model.pt2"
QUANTIZE = ("none", "fp16", "bf16")
NEEDS: tuple[str, ...] = ()
READS: tuple[str, ...] = ()


def check(model: TrainedModel) -> None:
    """Refuse nothing yet: what a network does is seen when it is traced."""


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Trace the student and save the graph."""
    model = source.model
    program, axes = trace(model.network, source.held_out[0], model.max_length, DTYPES[quantize])
    torch.export.save(program, folder / FILE)
    return Written(list(axes))


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Read the graph."""
    return Pt2Network(torch.export.load(folder / FILE).module(), exported.inputs)


class Pt2Network(nn.Module):
    """A graph as a network.

    Args:
        graph: What `ExportedProgram.module()` returns.
        inputs: Names of what it reads.
    """

    def __init__(self, graph: Any, inputs: list[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.held = (graph,)  # not as a part of this one: it refuses eval(), which it is in

    def forward(self, **entries: Tensor) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self.held[0](**{name: entries[name] for name in self.inputs})
        return logits
