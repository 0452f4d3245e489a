"""Checks all numbers of a configuration: finite, and in the range of their key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kd_lightning.runtime.errors import ConfigError

_LARGEST = 2**32 - 1
"""Of a seed: what torch, numpy and Python all take."""

_AT_LEAST_ZERO = ("lr", "weight_decay", "gradient_clip_val", "log_every_n_steps")
_AT_LEAST_ONE = (
    "accumulate_grad_batches", "num_nodes", "num_layers", "num_heads", "hidden_size", "embedding_size",
    "intermediate_size", "num_filters", "kernel_sizes", "widths", "convolutions", "depth", "flush_logs_every_n_steps",
)  # fmt: skip
_PROBABILITIES = ("dropout", "drop_rate")
_SHARES = ("warmup",)


def check_numbers(settings: dict[str, Any]) -> None:
    """Refuse numbers that are not finite, too large, or outside the range of their key.

    Raises:
        ConfigError: Names the key and what it takes.
    """
    for path, name, value in _numbers(settings):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value} must be a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{path}={value} is too large for a number here")
        wanted = _wanted(name, value)
        if wanted is not None:
            raise ConfigError(f"{path}={value} must be {wanted}")


def _wanted(name: str, value: float) -> str | None:
    """Return what a key of this name takes, where the value is something else."""
    limits = [
        (name in _AT_LEAST_ZERO and not value >= 0, "at least 0"),
        (name in _AT_LEAST_ONE and not value >= 1, "at least 1"),
        (name in _SHARES and not 0 <= value <= 1, "a share of the training, between 0 and 1"),
        (name in _PROBABILITIES and not 0 <= value < 1, "a probability, from 0 to below 1"),
        (name.endswith("seed") and not 0 <= value <= _LARGEST, f"at least 0 and at most {_LARGEST}"),
    ]
    return next((wanted for wrong, wanted in limits if wrong), None)


def _numbers(node: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, float]]:
    """Yield every number with its path and the name of the key that holds it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key), str(key))
    elif isinstance(node, list | tuple):
        for place, value in enumerate(node):
            yield from _numbers(value, f"{path}[{place}]", name)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, name, node
