"""The formats, one file each.

A format is a module with

* `FILE`, the file that is loaded, `QUANTIZE`, its precisions, `NEEDS` and `READS`, packages
  for writing and loading it;
* `check(model)`, which refuses a student that the format cannot hold, before anything is written;
* `write(source, quantize, folder)`, which writes the model and returns the details of the format;
* `load(folder, exported, threads)`, which loads it as a network from a batch's entries to logits.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from kd_lightning.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FORMATS = (
    "safetensors", "huggingface", "pt2", "onnx", "executorch", "openvino", "gguf", "peft", "sentence_transformers",
)  # fmt: skip
EXTRAS = {"onnx": "export", "executorch": "executorch", "openvino": "openvino", "gguf": "lm", "peft": "lm"}
"""The extra of the package that installs what a format needs."""

QUANTIZE = ("none", "int8-weights", "int8-dynamic", "int8-static", "fp16", "bf16")


@dataclass(frozen=True)
class Written:
    """Details of a written model.

    Attributes:
        inputs: Names of the model's inputs, in order.
        opset: ONNX's.
        beside: Files of weights beside `FILE`.
    """

    inputs: list[str]
    opset: int | None = None
    beside: tuple[str, ...] = ()


class Format(Protocol):
    """The interface of a format's module."""

    FILE: str
    QUANTIZE: tuple[str, ...]
    NEEDS: tuple[str, ...]
    READS: tuple[str, ...]

    def check(self, model: TrainedModel) -> None:
        """Raise `ConfigError` if the format cannot hold this student."""

    def write(self, source: Source, quantize: str, folder: Path) -> Written:
        """Write the model."""

    def load(self, folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
        """Read the model."""


def format_named(name: str) -> Format:
    """Return a format.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in FORMATS:
        raise ConfigError(f"--format {name} is unknown{did_you_mean(name, FORMATS)}")
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def check_choice(format: str, quantize: str) -> Format:
    """Return a format, after checking its quantisation and packages.

    Raises:
        ConfigError: The format lacks that quantisation, or a package is missing.
    """
    chosen = format_named(format)
    if quantize not in QUANTIZE:
        raise ConfigError(f"--quantize {quantize} is unknown{did_you_mean(quantize, QUANTIZE)}")
    if quantize not in chosen.QUANTIZE:
        raise ConfigError(f"--format {format} has no {quantize}; it can be: {', '.join(chosen.QUANTIZE)}")
    require_packages(format, chosen.NEEDS)
    return chosen


def require_packages(format: str, names: tuple[str, ...]) -> None:
    """Raise `ConfigError` if a package is missing."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"format {format} needs {', '.join(missing)}: pip install 'kd-lightning[{EXTRAS[format]}]'")
