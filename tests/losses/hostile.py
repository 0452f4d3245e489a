"""Finite tensors that break careless numerics: wide gaps, ties, constants, subnormals, very small and large entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Values = Literal["free", "unit", "attention"]
"""What a loss's tensors may be: any numbers, vectors of length 1, or distributions along the last axis."""

GAPS = torch.tensor([0.0, 0.5, -1.0, -10.0, -30.0, -45.0, -48.0, -51.0, -70.0, -87.0, -89.0, -95.0, -100.0, 100.0])
"""Below exp(-87) a float32 is subnormal, below exp(-104) it is zero; squares are from exp(-44) on."""


def _gaps(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return GAPS[torch.randint(len(GAPS), shape, generator=generator)]


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _rows_alike(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return _gaps(torch.Size([1, *shape[1:]]), generator).expand(shape).clone()


PATTERNS: dict[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "normal": _normal,
    "gaps": _gaps,
    "one far class": lambda shape, generator: _normal(shape, generator) + F.one_hot(
        torch.tensor(shape[-1] - 1), shape[-1]) * GAPS[torch.randint(len(GAPS), (1,), generator=generator)],
    "spread of 10": lambda shape, generator: 10 * _normal(shape, generator),
    "ties": lambda shape, generator: torch.randint(2, shape, generator=generator).float(),
    "zero": lambda shape, _: torch.zeros(shape),
    "constant": lambda shape, _: torch.full(shape, 0.3),
    "rows alike": _rows_alike,
    "subnormal": lambda shape, generator: 1e-40 * _normal(shape, generator),
    "squares subnormal": lambda shape, generator: 1e-20 * _normal(shape, generator),
    "large": lambda shape, generator: 1e4 * _normal(shape, generator).sign(),
    "large gaps": lambda shape, generator: 1e4 * torch.randint(-1, 2, shape, generator=generator).float(),
}  # fmt: skip


def hostile(pattern: str, shape: torch.Size, seed: int, values: Values = "free") -> Tensor:
    """Return a float32 tensor of a pattern, made into what the loss takes."""
    x = PATTERNS[pattern](shape, torch.Generator().manual_seed(seed))
    if values == "unit":
        return F.normalize(x, dim=-1)
    return x.softmax(-1) if values == "attention" else x
