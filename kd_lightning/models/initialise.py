"""The argument `initialise` of students that can start from trained weights."""

from __future__ import annotations

from typing import Literal, get_args

from kd_lightning.runtime.errors import ConfigError, did_you_mean

Initialise = Literal["teacher", "random"]


def check_initialise(initialise: str) -> None:
    """Raise `ConfigError` for anything but `teacher` and `random`."""
    if initialise not in get_args(Initialise):
        raise ConfigError(f"initialise={initialise!r} is unknown{did_you_mean(str(initialise), get_args(Initialise))}")
