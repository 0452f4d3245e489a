"""Weights only, for code that builds the network: this package or your own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from kd_lightning.export.formats import Written
from kd_lightning.export.graph import DTYPES
from kd_lightning.models.adapt import is_input

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.safetensors"
QUANTIZE = ("none", "fp16", "bf16")
NEEDS: tuple[str, ...] = ()
READS: tuple[str, ...] = ()


def check(model: TrainedModel) -> None:
    """Refuse nothing: every network has weights."""


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Write the weights, each tensor once, and `model.json`, the description of the network."""
    from safetensors.torch import save_file

    state = {}
    for name, tensor in source.model.network.state_dict().items():
        kept = tensor.detach().cpu().clone().contiguous()
        state[name] = kept.to(DTYPES[quantize]) if kept.is_floating_point() else kept
    save_file(state, folder / FILE)
    shutil.copyfile(source.stage / "model.json", folder / "model.json")
    return Written([name for name in source.held_out[0] if is_input(name)])


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Build the network in float32 and load the weights: 16 bits are only for storage."""
    from safetensors.torch import load_file

    from kd_lightning.config.trust import build_saved
    from kd_lightning.models.rebuild import from_description, is_description
    from kd_lightning.runtime.fingerprints import read_json

    settings = read_json(folder / "model.json")
    network = from_description(settings) if is_description(settings) else build_saved(settings, folder / "model.json")
    network.load_state_dict(load_file(folder / FILE))
    return network.eval()
