"""Console output."""

from __future__ import annotations

from rich.console import Console

from kd_lightning.runtime.borders import visible


def say(console: Console, line: str) -> None:
    """Print one line unbroken and without markup."""
    console.print(visible(line, keep="\n"), highlight=False, soft_wrap=True, markup=False)
