"""Console output."""

from __future__ import annotations

import time

from rich.console import Console

from kd_lightning.runtime.borders import visible

EVERY = 30.0
"""Seconds between lines of progress."""


class Pace:
    """When the next line of progress is due, and how long the rest takes at the pace so far.

    Args:
        first: What is done already.
    """

    def __init__(self, first: float = 0.0) -> None:
        self.first = first
        self._begun = self._printed = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether `EVERY` seconds have passed since the last line."""
        return time.monotonic() - self._printed >= EVERY

    def left(self, done: float, total: float) -> str:
        """Return the end of a line, the time left, after which the next line is not due for a while."""
        self._printed = time.monotonic()
        seconds = (self._printed - self._begun) / max(done - self.first, 1.0) * (total - done)
        return f"{seconds:.0f} s left"


def say(console: Console, line: str) -> None:
    """Print one line unbroken and without markup."""
    console.print(visible(line, keep="\n"), highlight=False, soft_wrap=True, markup=False)
