"""Lines on the screen."""

from __future__ import annotations

from rich.console import Console

from kd_lightning.runtime.borders import visible


def say(console: Console, line: str) -> None:
    """Print one line as it is: unbroken, and without reading markup into a path or a sentence."""
    console.print(visible(line, keep="\n"), highlight=False, soft_wrap=True, markup=False)
