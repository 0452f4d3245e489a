"""The pictures of a sweep's report: narrow ones, that stay readable on a phone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.report.pictures import COLOURS, TERM_COLOURS, new_figure, tidy
from kd_lightning.report.results import score_title
from kd_lightning.report.sweep.points import Value
from kd_lightning.report.table import count, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Inches: at a phone's width letters of 9 points are still as large as those of the page."""
PANELS = 6
"""More heat maps than this side by side compare nothing."""
CHOSEN = "#D55E00"
"""The colour of the chosen configuration."""
STUDENTS = [colour for colour in TERM_COLOURS if colour not in (COLOURS["baseline"], COLOURS["teacher"])]

Configurations = Sequence[Mapping[str, Any]]


def figures(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Draw whatever the sweep's parameters allow.

    Args:
        document: What `build_sweep` returns.

    Yields:
        A file name without its suffix, a caption, and the figure.
    """
    if not document["configurations"]:
        return
    yield from _maps(document)
    for parameter in document["parameters"]:
        if len(parameter["values"]) > 1:
            yield (
                f"parameter_{parameter['name']}",
                _parameter_caption(parameter),
                _parameter_figure(document, parameter),
            )
    numeric = [parameter for parameter in document["parameters"] if parameter["numeric"]]
    if len(numeric) >= 3 or (len(numeric) == 2 and any(parameter["searched"] for parameter in numeric)):
        caption = "Every configuration, from parameter to score; the chosen one is orange."
        yield "parallel", caption, _parallel_figure(document)
    if len({entry["parameters"] for entry in document["configurations"]} - {None}) > 1:
        yield "size", "Validation score against the student's parameters.", _price_figure(document, "parameters")
        if all(entry["latency_ms"] for entry in document["configurations"]):
            caption = "Validation score against the time to answer one example. Each point measured its own."
            yield "latency", caption, _price_figure(document, "latency_ms")


def label(value: Value) -> str:
    """Write a parameter's value.

    >>> label(0.1), label(8.0), label(0.00123456), label("dkd")
    ('0.1', '8', '0.001235', 'dkd')
    """
    return value if isinstance(value, str) else f"{value:.4g}"


def baseline_of(configurations: Configurations) -> float | None:
    """Return the mean validation score of the students from labels, None where there are none."""
    means = [entry["baseline"]["mean"] for entry in configurations if entry["baseline"]["mean"] is not None]
    return statistics.fmean(means) if means else None


# -- two parameters ---------------------------------------------------------------------------------------------------


def _maps(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Draw a heat map for each setting of the other parameters, or where the pairs are no grid, all as points."""
    numeric = [entry["name"] for entry in document["parameters"] if entry["numeric"] and len(entry["values"]) > 1]
    pair = sorted(numeric, key=lambda name: (name != "alpha", name != "temperature"))[:2]
    if len(pair) < 2:
        return
    panels: dict[tuple[Value, ...], list[Mapping[str, Any]]] = {}
    for entry in document["configurations"]:
        others = tuple(value for name, value in entry["values"].items() if name not in pair)
        panels.setdefault(others, []).append(entry)
    x, y = ({entry["values"][name] for entry in document["configurations"]} for name in pair)
    cells = {tuple(entry["values"][name] for name in pair) for entry in document["configurations"]}
    if len(x) * len(y) > 2 * len(cells):
        caption = f"{pair[1]} against {pair[0]}; the ring is the chosen configuration."
        yield "scatter", caption, _scatter_figure(document, pair)
        return
    if len(panels) > PANELS:
        return
    for number, (others, entries) in enumerate(panels.items(), start=1):
        names = [name for name in document["configurations"][0]["values"] if name not in pair]
        setting = ", ".join(f"{name}={label(value)}" for name, value in zip(names, others, strict=True))
        name = "heatmap" if len(panels) == 1 else f"heatmap_{number}"
        yield name, _map_caption(entries, setting), _map_figure(document, entries, pair, setting)


def _map_caption(entries: Configurations, setting: str) -> str:
    base = baseline_of(entries)
    plane = "" if base is None else (
        f" White is the student from labels alone ({base:.3f}); orange is worse than it, blue is better."
    )  # fmt: skip
    where = f" ({setting})" if setting else ""
    return f"Mean over seeds, deviation and number of seeds{where}. The chosen one is framed, grey has none.{plane}"


def _map_figure(document: Mapping[str, Any], entries: Configurations, pair: Sequence[str], setting: str) -> Figure:
    import numpy as np
    from matplotlib.patches import Rectangle

    columns, rows = (sorted({entry["values"][name] for entry in document["configurations"]}) for name in pair)
    means = np.full((len(rows), len(columns)), np.nan)
    figure = new_figure(max(WIDTH, 1.4 + 0.75 * len(columns)), 1.3 + 0.55 * max(len(rows), 2))
    axes = figure.add_subplot()
    colours, norm = _scale(entries)
    for entry in entries:
        column, row = columns.index(entry["values"][pair[0]]), rows.index(entry["values"][pair[1]])
        found = entry["validation"]
        means[row, column] = found["mean"]
        spread = "" if found["std"] is None else f"±{found['std']:.3f}, "
        red, green, blue, _ = colours(norm(found["mean"]))
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.6 else "black"
        axes.text(column, row + 0.16, f"{found['mean']:.3f}", ha="center", va="center", color=ink, fontsize=9)
        n = f"{spread}n={len(found['values'])}"
        axes.text(column, row - 0.22, n, ha="center", va="center", color=ink, fontsize=6.5)
        if entry["values"] == document["chosen"]["values"]:
            axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="black", lw=2))
    axes.set_facecolor("#eeeeee")  # of points that failed or are not finished
    image = axes.imshow(means, cmap=colours, norm=norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), [label(value) for value in columns])
    axes.set_yticks(range(len(rows)), [label(value) for value in rows])
    axes.set_xlabel(pair[0])
    axes.set_ylabel(pair[1])
    axes.set_title(setting, fontsize=10)
    _colour_bar(figure, axes, image, document, baseline_of(entries))
    return figure


def _scale(entries: Configurations) -> tuple[Colormap, Normalize]:
    """Return colours for validation scores: white where the student from labels stands, orange below, blue above."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    means = [entry["validation"]["mean"] for entry in entries]
    base = baseline_of(entries)
    if base is None:
        room = max(max(means) - min(means), 1e-6)
        return LinearSegmentedColormap.from_list("kd", ["#d6e6f2", COLOURS["distilled"]]), Normalize(
            max(means) - room, max(means)
        )
    reach = max(*(abs(mean - base) for mean in means), 1e-6)
    colours = [COLOURS["baseline"], "#ffffff", COLOURS["distilled"]]
    return LinearSegmentedColormap.from_list("kd", colours), Normalize(base - reach, base + reach)


def _colour_bar(figure: Figure, axes: Axes, image: Any, document: Mapping[str, Any], base: float | None) -> None:
    """Add the scale, as far as it is used, with a mark where the student from labels stands."""
    bar = figure.colorbar(image, ax=axes, label=f"validation {score_title(document['score'])}")
    bar.outline.set_visible(False)
    if base is not None:
        means = [entry["validation"]["mean"] for entry in document["configurations"]]
        bar.ax.set_ylim(max(min([base, *means]), image.norm.vmin), min(max([base, *means]), image.norm.vmax))
        bar.ax.axhline(base, color=COLOURS["baseline"], linewidth=3)


def _scatter_figure(document: Mapping[str, Any], pair: Sequence[str]) -> Figure:
    figure = new_figure(WIDTH, 3.6)
    axes = figure.add_subplot()
    configurations = document["configurations"][::-1]  # the best on top
    x, y = ([entry["values"][name] for entry in configurations] for name in pair)
    colours, norm = _scale(configurations)
    means = [entry["validation"]["mean"] for entry in configurations]
    image = axes.scatter(x, y, c=means, cmap=colours, norm=norm, s=70, edgecolor="#444444", linewidth=0.6)
    best = document["chosen"]["values"]
    axes.scatter(best[pair[0]], best[pair[1]], s=220, facecolor="none", edgecolor=CHOSEN, linewidth=2)
    axes.set_xscale("log" if _ratios(x) else "linear")
    axes.set_yscale("log" if _ratios(y) else "linear")
    axes.set_xlabel(pair[0])
    axes.set_ylabel(pair[1])
    tidy(axes)
    _colour_bar(figure, axes, image, document, baseline_of(configurations))
    return figure


# -- one parameter ----------------------------------------------------------------------------------------------------


def _parameter_caption(parameter: Mapping[str, Any]) -> str:
    if parameter["searched"]:
        return f"Validation score of every configuration against {parameter['name']}."
    return f"{parameter['name']}: mean and standard deviation over seeds and everything else that varies."


def _parameter_figure(document: Mapping[str, Any], parameter: Mapping[str, Any]) -> Figure:
    figure = new_figure(WIDTH, 3.2)
    axes = figure.add_subplot()
    means = [found["mean"] for found in parameter["values"]]
    spreads = [found["std"] or 0.0 for found in parameter["values"]]
    values, colour = [found["value"] for found in parameter["values"]], COLOURS["distilled"]
    if not parameter["numeric"]:
        places = range(len(values))
        axes.errorbar(places, means, yerr=spreads, color=colour, marker="s", capsize=4, linestyle="none")
        axes.set_xticks(places, [label(value) for value in values], rotation=30 if len(values) > 4 else 0)
        axes.set_xlim(-0.5, len(values) - 0.5)
    elif parameter["searched"]:
        axes.plot(values, means, color=colour, marker="o", linestyle="none", alpha=0.8)
        axes.set_xscale("log" if _ratios(values) else "linear")
    else:
        axes.plot(values, means, color=colour, marker="s", markersize=4, linewidth=1.8)
        low, high = ([mean + sign * s for mean, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(values, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xscale("log" if _ratios(values) else "linear")
        axes.set_xticks(values, [label(value) for value in values])
        axes.minorticks_off()
    _references(document, axes)
    axes.set_xlabel(parameter["name"])
    axes.set_ylabel(f"validation {score_title(document['score'])}")
    tidy(axes)
    return figure


def _references(document: Mapping[str, Any], axes: Axes) -> None:
    """Draw what a student has from labels alone, and what the teacher has."""
    base = baseline_of(document["configurations"])
    for level, name, text in ((base, "baseline", "student from labels"), (document["teacher"], "teacher", "teacher")):
        if level is not None:
            axes.axhline(level, color=COLOURS[name], linestyle="--", linewidth=1.2, label=text, zorder=1)
    if axes.get_legend_handles_labels()[0] and axes.figure:
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _ratios(values: Collection[float]) -> bool:
    """Return whether values are laid out by ratio: they span much, and their middle is nearer to the geometric one.

    >>> _ratios([1, 2, 4, 8, 16]), _ratios([0.1, 0.3, 0.5, 0.7, 0.9])
    (True, False)
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return low > 0 and high >= 8 * low and abs(middle - math.sqrt(low * high)) < abs(middle - (low + high) / 2)


# -- all of them ------------------------------------------------------------------------------------------------------


def _parallel_figure(document: Mapping[str, Any]) -> Figure:
    """Draw each configuration as a line over one scale per parameter, and one for the score."""
    configurations = document["configurations"]
    scales = {parameter["name"]: parameter for parameter in document["parameters"] if len(parameter["values"]) > 1}
    title = f"validation {score_title(document['score'])}"
    columns = {name: [entry["values"][name] for entry in configurations] for name in scales}
    columns[title] = [entry["validation"]["mean"] for entry in configurations]
    heights = {name: _heights(values) for name, values in columns.items()}
    figure = new_figure(max(WIDTH, 1.3 * len(columns)), 3.6)
    axes = figure.add_subplot()
    colours, norm = _scale(configurations)
    for number in reversed(range(len(configurations))):
        chosen = number == document["chosen"]["rank"]
        colour = CHOSEN if chosen else colours(norm(columns[title][number]))
        line = [heights[name][number] for name in columns]
        axes.plot(range(len(columns)), line, color=colour, linewidth=2.6 if chosen else 1.1, zorder=3 if chosen else 2)
    for place, (name, values) in enumerate(columns.items()):
        axes.axvline(place, color="#444444", linewidth=0.8, zorder=1)
        for height, text in _marks(values, heights[name]):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8}
            axes.text(place + 0.03, height, text, fontsize=8, va="center", bbox=box, zorder=4)
    axes.set_xticks(range(len(columns)), [name.replace(" ", "\n", 1) for name in columns])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.spines[:].set_visible(False)
    return figure


def _heights(values: Sequence[Value]) -> list[float]:
    """Return where values stand between 0 and 1: texts in order, numbers by size, by ratio if they span much."""
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        order = sorted({label(value) for value in values})
        return [order.index(label(value)) / (len(order) - 1) for value in values]
    if _ratios(numbers):
        numbers = [math.log(number) for number in numbers]
    low, high = min(numbers), max(numbers)
    return [(number - low) / (high - low) if high > low else 0.5 for number in numbers]


def _marks(values: Sequence[Value], heights: Sequence[float]) -> list[tuple[float, str]]:
    """Return the heights to write a value at: all of a few, else the ends."""
    marks = dict(sorted(zip(heights, map(label, values), strict=True)))
    if len(marks) > 6:
        marks = {height: marks[height] for height in (min(marks), max(marks))}
    return list(marks.items())


def _price_figure(document: Mapping[str, Any], price: str) -> Figure:
    """Draw validation scores against what a student costs: `parameters` or `latency_ms`."""
    figure = new_figure(WIDTH, 3.4)
    axes = figure.add_subplot()
    students: dict[str, list[Mapping[str, Any]]] = {}
    for entry in document["configurations"]:
        kind = ", ".join(
            label(v) for name, v in entry["values"].items() if name.startswith(("student", "model@student"))
        )
        students.setdefault(kind or "student", []).append(entry)
    for number, (kind, entries) in enumerate(students.items()):
        axes.errorbar(
            [entry[price] for entry in entries], [entry["validation"]["mean"] for entry in entries],
            yerr=[entry["validation"]["std"] or 0.0 for entry in entries], label=kind, marker="o", capsize=3,
            linestyle="none", color=STUDENTS[number % len(STUDENTS)],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(_few(sorted(entry[price] for entry in document["configurations"])))
    axes.xaxis.set_major_formatter(lambda value, _: (count if price == "parameters" else short)(value))
    axes.minorticks_off()
    axes.set_xlabel("parameters" if price == "parameters" else "latency of one example, ms")
    axes.set_ylabel(f"validation {score_title(document['score'])}")
    _references(document, axes)
    tidy(axes)
    return figure


def _few(values: Sequence[float]) -> list[float]:
    """Return those of ascending values that are no nearer than a fifth to the last one before them."""
    kept = [values[0]]
    for value in values:
        if value > 1.2 * kept[-1]:
            kept.append(value)
    return kept
