"""What the pictures of a sweep have in common: their width, the labels of values, scales."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.evaluation.report.style import COLOURS
from kd_lightning.evaluation.report.sweep.points import Value, title_of
from kd_lightning.runtime.borders import drawn, visible

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

WIDTH = 5.0
"""Width in inches: on a phone, 9-point letters have the size of the page's text."""
LETTERS = 18
"""Longest line of a value's label."""
CHOSEN = "#D55E00"
"""The colour of the chosen configuration."""

Configurations = Sequence[Mapping[str, Any]]


def label(value: Value) -> str:
    """Format a parameter's value; a schedule by its name.

    >>> label(0.1), label(8.0), label(0.00123456), label("dkd")
    ('0.1', '8', '0.001235', 'dkd')
    >>> label("{_target_: kd_lightning.schedules.Linear, start: 1.0, end: 0.5}")
    'Linear(start: 1.0, end: 0.5)'
    """
    if isinstance(value, str):
        return re.sub(r"^\{_target_: *[\w.]*?(\w+), *(.*)\}$", r"\1(\2)", value)
    return f"{value:.4g}"


def tick(value: Value) -> str:
    r"""Break a parameter's value into lines for an axis.

    >>> tick("Linear(start: 1.0, end: 0.5)")
    'Linear(start: 1.0,\nend: 0.5)'
    """
    return drawn("\n".join(textwrap.wrap(visible(label(value)), LETTERS, max_lines=3, placeholder="…")), keep="\n")


def has_gains(configurations: Configurations) -> bool:
    """Return whether each configuration has students from labels to be compared with."""
    return all(entry["gain"]["mean"] is not None for entry in configurations)


def baseline_name(document: Mapping[str, Any]) -> str:
    """Return what the students from labels are called."""
    return "student from labels" if document["against"] == "baseline" else "student from labels, same start"


def score_label(document: Mapping[str, Any]) -> str:
    """Return what the axis of validation scores is called."""
    return drawn(f"validation {title_of(document)}")


def ratios(values: Collection[float]) -> bool:
    """Return whether values need a log scale: a wide range with a geometric middle.

    >>> ratios([1, 2, 4, 8, 16]), ratios([0.1, 0.3, 0.5, 0.7, 0.9])
    (True, False)
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return low > 0 and high >= 8 * low and abs(middle - math.sqrt(low * high)) < abs(middle - (low + high) / 2)


def ramp(low: str) -> Colormap:
    """Return colours from a light one to the students'."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("kd", [low, COLOURS["distilled"]])
