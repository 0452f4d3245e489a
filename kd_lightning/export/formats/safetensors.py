"""Weights only, for code that builds the network: this package or your own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from kd_lightning.export.formats import Written
from kd_lightning.export.graph import in_precision
from kd_lightning.export.int8 import in_int8
from kd_lightning.models.adapt import is_input
from kd_lightning.models.rebuild import describe, from_description, is_description
from kd_lightning.runtime.fingerprints import read_json, write_json

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.safetensors"
QUANTIZE = ("none", "int8-weights", "fp16", "bf16")
NEEDS: tuple[str, ...] = ()
READS: tuple[str, ...] = ()


def check(model: TrainedModel) -> None:
    """Refuse nothing: every network has weights."""


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Write the weights, each tensor once, and `model.json`, the description of the network."""
    from safetensors.torch import save_model

    save_model(in_precision(source.network, quantize), str(folder / FILE))
    description = describe(source.network)
    if description is None:
        shutil.copyfile(source.stage / "model.json", folder / "model.json")
    else:
        write_json(folder / "model.json", description)
    return Written([name for name in source.held_out[0] if is_input(name)])


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Build the network in float32 and load the weights: 16 bits are only for storage; 8 stay as they are."""
    from safetensors.torch import load_model

    from kd_lightning.config.trust import build_saved

    settings = read_json(folder / "model.json")
    network = from_description(settings) if is_description(settings) else build_saved(settings, folder / "model.json")
    network = in_int8(network) if exported.quantize == "int8-weights" else network
    load_model(network, folder / FILE)
    return network.eval()
