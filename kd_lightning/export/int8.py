"""Weights in 8 bits, a scale for each output: a quarter of the size, computed in float32.

`W` is stored as `round(W / s)` with `s = max |W_i| / 127` for each row i. Nothing else is quantised: not activations,
biases or normalisations. A table that is also an output layer stays one.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kd_lightning.runtime.errors import ConfigError


class _Int8(nn.Module):
    """A matrix `(R, C)` in 8 bits, with a scale a row."""

    levels: Tensor
    scale: Tensor

    def __init__(self, levels: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The matrix in float32."""
        return self.levels * self.scale


class Int8Linear(_Int8):
    """A linear layer of such a matrix."""

    def __init__(self, levels: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(levels, scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`."""
        return F.linear(x, self.weight, self.bias)


class Int8Embedding(_Int8):
    """A table of such a matrix."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of these numbers."""
        return F.embedding(ids, self.levels) * F.embedding(ids, self.scale)


def in_int8(network: nn.Module, tables_only: bool = False) -> nn.Module:
    """Return a copy of a network whose linear layers and tables are in 8 bits.

    Args:
        network: It is copied, not changed.
        tables_only: Leave linear layers as they are; a network without a table is then only copied.

    Raises:
        ConfigError: It has neither.
    """
    kinds = (nn.Embedding,) if tables_only else (nn.Linear, nn.Embedding, Conv1D)
    network = copy.deepcopy(network).eval()
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by the weight, which several layers may share
    for name, layer in list(network.named_modules()):
        if type(layer) not in kinds:  # a class of these may do more
            continue
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        levels, scale = made.setdefault(id(layer.weight), _levels(weight.detach().float()))
        new = Int8Embedding(levels, scale) if isinstance(layer, nn.Embedding) else Int8Linear(levels, scale, layer.bias)
        network.set_submodule(name, new)
    if not made and not tables_only:
        raise ConfigError(
            f"{type(network).__name__} has no linear layer or table to hold in 8 bits: use another format"
        )
    return network


def _levels(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale).round().to(torch.int8).contiguous(), scale
