"""Checks of the options of data modules."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

from kd_lightning.runtime.errors import ConfigError


def check_least(lowest: int, **options: int) -> None:
    """Refuse data options that are no whole numbers, or below `lowest`."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ConfigError(f"data.{name}={value!r}: expected a whole number")
        if value < lowest:
            raise ConfigError(f"data.{name}={value}: expected {lowest} or more")


def check_probabilities(**options: float) -> None:
    """Refuse data options outside [0, 1]."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"data.{name}={value}: expected a probability, 0 to 1")


def check_fractions(fractions: Sequence[float], source: str) -> None:
    """Refuse impossible shares to hold out.

    Raises:
        ConfigError: A fraction outside (0, 1), or fractions that leave nothing.
    """
    if any(not 0 < fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
        given = ", ".join(f"{fraction:g}" for fraction in fractions)
        message = f"cannot hold out the fractions {given} of {source}: each must lie between 0 and 1, their sum below 1"
        raise ConfigError(f"{message}; change data.validation_fraction or data.test_fraction")
