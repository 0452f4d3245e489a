"""The style of all pictures: colours, markers, frames, dots with numbers, names at ends of lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, for colour-blind readers
COLOURS = {
    "teacher": "#000000",
    "assistant": "#56B4E9",
    "baseline": "#E69F00",
    "baseline_initialised": "#CC79A7",
    "distilled": "#0072B2",
    "finetuned": "#009E73",
}
MARKERS = {
    "teacher": "*",
    "assistant": "v",
    "baseline": "o",
    "baseline_initialised": "D",
    "distilled": "s",
    "finetuned": "^",
}
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Colours of lines that are none of the above."""
GREY = "#8A8A8A"
"""Of what is drawn to compare with."""
TITLE, SMALL = 11, 9
"""Sizes of fonts, in points, besides matplotlib's own 10."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure with constrained layout; sizes in inches."""
    from matplotlib.figure import Figure  # takes most of a second, and is only needed here

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes) -> None:
    """Remove the axes' superfluous lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot: its value, the ends of its bar where it has one, and how it is drawn."""

    name: str
    value: float
    bar: tuple[float, float] | None = None
    colour: str = COLOURS["distilled"]
    marker: str = MARKERS["distilled"]


def dots(axes: Axes, rows: Sequence[Dot], write: Callable[[float], str]) -> None:
    """Draw rows from the top: a dot, its bar, and its number at the right; NaN is left out."""
    for y, row in enumerate(rows):
        if math.isnan(row.value):
            continue
        low, high = row.bar or (row.value, row.value)
        axes.errorbar(
            row.value, y, xerr=[[row.value - low], [high - row.value]] if row.bar else None, color=row.colour,
            marker=row.marker, markersize=6, capsize=2, linestyle="none",
        )  # fmt: skip
        _beside(axes, y, write(row.value), row.colour)
    name_rows(axes, [row.name for row in rows])


def _beside(axes: Axes, y: float, text: str, colour: str) -> None:
    """Write at the right of the axes, at a height in units of the data."""
    place = axes.get_yaxis_transform()
    axes.text(1.01, y, text, color=colour, fontsize=SMALL, verticalalignment="center", transform=place)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write a name beside each row of a picture, from the top, on a faint line."""
    tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


@dataclass(frozen=True)
class End:
    """Where a line ends, what it is called, and its colour; a line across the picture has no `x`."""

    x: float | None
    y: float
    name: str
    colour: str


def name_lines(axes: Axes, ends: Sequence[End]) -> None:
    """Write names at the right of lines, moved apart; that of a line that ends before, above its end.

    Args:
        axes: Whose limits are set.
        ends: One a line.
    """
    right = max((end.x for end in ends if end.x is not None), default=0.0)
    beside = [end for end in ends if end.x is None or end.x == right]
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # in points
    heights = spread_out([end.y for end in beside], gap=1.5 * SMALL * (high - low) / height)
    for end, place in zip(beside, heights, strict=True):
        _beside(axes, place, end.name, end.colour)
    for end in (end for end in ends if end not in beside):
        assert end.x is not None
        axes.annotate(
            end.name, (end.x, end.y), xytext=(0, 9), textcoords="offset points", horizontalalignment="center",
            color=end.colour, fontsize=SMALL,
        )  # fmt: skip


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours are at least `gap` apart.

    The order and the mean of every moved group are kept.

    >>> spread_out([0.0, 0.1, 5.0], gap=1.0)
    [-0.45, 0.55, 5.0]
    """
    groups: list[list[int]] = []  # runs of touching labels, spaced evenly around their mean
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])

    def middle(group: list[int]) -> float:
        return statistics.fmean(wanted[i] for i in group)

    def half(group: list[int]) -> float:
        return gap * (len(group) - 1) / 2

    for index in order:
        groups.append([index])
        while len(groups) > 1 and middle(groups[-1]) - half(groups[-1]) < middle(groups[-2]) + half(groups[-2]) + gap:
            last = groups.pop()
            groups[-1] = groups[-1] + last
    placed = [0.0] * len(wanted)
    for group in groups:
        for rank, index in enumerate(group):
            placed[index] = round(middle(group) - half(group) + gap * rank, 9)
    return placed
