"""Heat maps and points over two parameters of a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kd_lightning.evaluation.report.style import COLOURS, new_figure, tidy
from kd_lightning.evaluation.report.sweep.axes import (
    CHOSEN,
    WIDTH,
    Configurations,
    baseline_name,
    has_gains,
    label,
    ramp,
    ratios,
    score_label,
    tick,
)
from kd_lightning.evaluation.report.sweep.points import Value, better_of
from kd_lightning.runtime.borders import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

PANELS = 6
"""Largest number of heat maps; those with the best configurations are drawn."""


def maps(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Draw a heat map for each setting of the other parameters, or points if there is no grid."""
    varied = {entry["name"]: entry["numeric"] for entry in document["parameters"] if len(entry["values"]) > 1}
    first = ("alpha", "temperature")  # which may be schedules
    pair = sorted((name for name in varied if varied[name] or name in first), key=lambda name: _place(name, first))[:2]
    if len(pair) < 2:
        return
    x, y = (_values(document, name) for name in pair)
    entries = [*document["configurations"], *document["failed"], *document["unfinished"]]
    cells = {tuple(entry["values"][name] for name in pair) for entry in entries}
    if len(x) * len(y) > 2 * len(cells) and all(map(varied.get, pair)):
        caption = f"{pair[1]} against {pair[0]}; the ring is the chosen configuration."
        yield "scatter", caption, _scatter_figure(document, pair)
        return
    panels: dict[tuple[Value, ...], list[Mapping[str, Any]]] = {}
    for entry in document["configurations"]:  # the best first
        others = tuple(value for name, value in entry["values"].items() if name not in pair)
        panels.setdefault(others, []).append(entry)
    names = [name for name in document["configurations"][0]["values"] if name not in pair]
    for number, (others, found) in enumerate(list(panels.items())[:PANELS], start=1):
        setting = ", ".join(f"{name}={label(value)}" for name, value in zip(names, others, strict=True))
        caption = _map_caption(document, found, setting)
        if number == PANELS < len(panels):
            caption += f" Not drawn, since none of the best: {len(panels) - PANELS} more; see the table."
        name = "heatmap" if len(panels) == 1 else f"heatmap_{number}"
        yield name, caption, _map_figure(document, found, pair, (x, y), setting)


def _place(name: str, first: Sequence[str]) -> int:
    return first.index(name) if name in first else len(first)


def _values(document: Mapping[str, Any], name: str) -> list[Value]:
    """Return a parameter's values in order, including those whose points all failed."""
    numeric = next(entry["numeric"] for entry in document["parameters"] if entry["name"] == name)
    entries = (*document["configurations"], *document["failed"], *document["unfinished"])
    values = {entry["values"][name] for entry in entries}
    return sorted((v for v in values if not (numeric and isinstance(v, str))), key=lambda v: (isinstance(v, str), v))


def _seeds(document: Mapping[str, Any]) -> int | None:
    """Return how many seeds every configuration has; None if they differ."""
    numbers = {len(entry["validation"]["values"]) for entry in document["configurations"]}
    return numbers.pop() if len(numbers) == 1 else None


def _map_caption(document: Mapping[str, Any], entries: Configurations, setting: str) -> str:
    seeds = _seeds(document)
    what = {None: "Mean over n seeds and standard deviation", 1: "One seed each"}.get(
        seeds, f"Mean over {seeds} seeds and standard deviation"
    )
    plane = ""
    if has_gains(entries):
        base = statistics.fmean(entry["baseline"]["mean"] for entry in entries)
        plane = (
            f" What distillation gains over the {baseline_name(document)} ({base:.3f}): blue is better, orange worse."
        )
    where = f" ({setting})" if setting else ""
    return f"{what}{where}. The chosen one is framed; grey failed or is not finished.{plane}"


def _map_figure(
    document: Mapping[str, Any], entries: Configurations, pair: Sequence[str], axis: Sequence[Sequence[Value]],
    setting: str,
) -> Figure:  # fmt: skip
    import numpy as np
    from matplotlib.patches import Rectangle

    columns, rows = axis
    means = np.full((len(rows), len(columns)), np.nan)
    figure = new_figure(max(WIDTH, 1.4 + 0.9 * len(columns)), 1.3 + 0.6 * max(len(rows), 2))
    axes = figure.add_subplot()
    shown, write = _shown(entries)
    colours, norm = _scale(document, entries)
    for entry in entries:
        column, row = columns.index(entry["values"][pair[0]]), rows.index(entry["values"][pair[1]])
        mean, below = entry[shown]["mean"], _below(entry[shown], _seeds(document) is None)
        means[row, column] = mean
        red, green, blue, _ = colours(norm(mean))
        text: dict[str, Any] = {
            "color": "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.6 else "black",
            "ha": "center", "va": "center",
        }  # fmt: skip
        axes.text(column, row + (0.17 if below else 0), write(mean), fontsize=10, **text)
        axes.text(column, row - 0.22, below, fontsize=8, **text)
        if entry["values"] == document["chosen"]["values"]:
            axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="black", lw=2))
    axes.set_facecolor("#dddddd")
    image = axes.imshow(means, cmap=colours, norm=norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), [tick(value) for value in columns])
    axes.set_yticks(range(len(rows)), [tick(value) for value in rows])
    axes.set_xlabel(drawn(pair[0]))
    axes.set_ylabel(drawn(pair[1]))
    if setting:
        axes.set_title(drawn(setting, letters=200), fontsize=10, wrap=True)
    _colour_bar(figure, axes, image, document, entries)
    return figure


def _shown(entries: Configurations) -> tuple[Literal["gain", "validation"], Callable[[float], str]]:
    """Return which figure of configurations is drawn, the gain where there is one, and how it is written."""
    return ("gain", "{:+z.3f}".format) if has_gains(entries) else ("validation", "{:.3f}".format)


def _means(document: Mapping[str, Any], shown: Literal["gain", "validation"]) -> list[float]:
    """Return that figure of all configurations that have it."""
    return [entry[shown]["mean"] for entry in document["configurations"] if entry[shown]["mean"] is not None]


def _below(found: Mapping[str, Any], numbered: bool) -> str:
    """Return the text below a mean: its deviation, and the number of seeds if it varies."""
    deviation = [] if found["std"] is None else [f"±{found['std']:.3f}"]
    return ", ".join([*deviation, *([f"n={len(found['values'])}"] if numbered else [])])


def _scale(document: Mapping[str, Any], entries: Configurations) -> tuple[Colormap, Normalize]:
    """Return colours for gains, or for validation scores: white is no gain, orange worse, blue better.

    Shades are comparable across maps.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shown, _ = _shown(entries)
    means = _means(document, shown)
    if shown == "validation":
        colours, norm = ramp("#d6e6f2"), Normalize(min(max(means) - 1e-6, *means), max(means))
        return colours if better_of(document) > 0 else colours.reversed(), norm
    reach = max(1e-6, *map(abs, means))
    ends = [COLOURS["baseline"], "#ffffff", COLOURS["distilled"]]
    return LinearSegmentedColormap.from_list("kd", ends), Normalize(-reach, reach)


def _colour_bar(figure: Figure, axes: Axes, image: Any, document: Mapping[str, Any], entries: Configurations) -> None:
    """Add the used part of the scale."""
    bar = figure.colorbar(image, ax=axes, label=score_label(document))
    bar.outline.set_visible(False)
    if has_gains(entries):
        means = _means(document, "gain")
        bar.set_label(f"{score_label(document)}: gain over the\n{baseline_name(document)}")
        bar.ax.set_ylim(min(0.0, *means), max(1e-6, *means))


def _scatter_figure(document: Mapping[str, Any], pair: Sequence[str]) -> Figure:
    figure = new_figure(WIDTH, 3.6)
    axes = figure.add_subplot()
    configurations = document["configurations"][::-1]  # the best on top
    x, y = ([entry["values"][name] for entry in configurations] for name in pair)
    colours, norm = _scale(document, configurations)
    means = [entry[_shown(configurations)[0]]["mean"] for entry in configurations]
    image = axes.scatter(x, y, c=means, cmap=colours, norm=norm, s=70, edgecolor="#444444", linewidth=0.6)
    best = document["chosen"]["values"]
    axes.scatter(best[pair[0]], best[pair[1]], s=220, facecolor="none", edgecolor=CHOSEN, linewidth=2)
    axes.set_xscale("log" if ratios(x) else "linear")
    axes.set_yscale("log" if ratios(y) else "linear")
    axes.set_xlabel(drawn(pair[0]))
    axes.set_ylabel(drawn(pair[1]))
    tidy(axes)
    _colour_bar(figure, axes, image, document, configurations)
    return figure
