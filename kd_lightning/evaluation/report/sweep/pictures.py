"""The pictures of a sweep's report, narrow enough for a phone."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.evaluation.report.pictures import COLOURS, TERM_COLOURS, new_figure, tidy
from kd_lightning.evaluation.report.sweep.points import Value, better_of, title_of
from kd_lightning.evaluation.report.table import count, short
from kd_lightning.runtime.borders import drawn, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Width in inches: on a phone, 9-point letters have the size of the page's text."""
PANELS = 6
"""Largest number of heat maps; those with the best configurations are drawn."""
LETTERS = 18
"""Longest line of a value's label."""
CHOSEN = "#D55E00"
"""The colour of the chosen configuration."""
PRICES = (
    ("size", "parameters", "Validation score against the number of parameters."),
    (
        "latency",
        "latency_ms",
        "Validation score against the latency of one example: the median over a student's points.",
    ),
)
"""The costs of accuracy: a file name, the key of a configuration, a caption."""
STUDENTS = [colour for colour in TERM_COLOURS if colour not in (COLOURS["baseline"], COLOURS["teacher"])]

Configurations = Sequence[Mapping[str, Any]]


def figures(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Draw the pictures that the sweep's parameters allow.

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
    varied = [parameter for parameter in document["parameters"] if len(parameter["values"]) > 1]
    if len(varied) > 1 and (document["search"] or sum(parameter["numeric"] for parameter in varied) > 2):
        caption = "Every configuration, from parameter to score; the chosen one is orange."
        yield "parallel", caption, _parallel_figure(document)
    for name, price, caption in PRICES:
        if len(_prices(document, price)) > 1:
            yield name, caption, _price_figure(document, price)


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


def _tick(value: Value) -> str:
    r"""Break a parameter's value into lines for an axis.

    >>> _tick("Linear(start: 1.0, end: 0.5)")
    'Linear(start: 1.0,\nend: 0.5)'
    """
    return drawn("\n".join(textwrap.wrap(visible(label(value)), LETTERS, max_lines=3, placeholder="…")), keep="\n")


def baseline_of(configurations: Configurations) -> float | None:
    """Return the mean validation score of the students from labels, None without any."""
    means = [entry["baseline"]["mean"] for entry in configurations if entry["baseline"]["mean"] is not None]
    return statistics.fmean(means) if means else None


# -- two parameters ---------------------------------------------------------------------------------------------------


def _maps(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
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
    seeds, base = _seeds(document), baseline_of(entries)
    what = {None: "Mean over n seeds and standard deviation", 1: "One seed each"}.get(
        seeds, f"Mean over {seeds} seeds and standard deviation"
    )
    plane = "" if base is None else (
        f" White is the student from labels alone ({base:.3f}); orange is worse than it, blue is better."
    )  # fmt: skip
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
    colours, norm = _scale(document, entries)
    for entry in entries:
        column, row = columns.index(entry["values"][pair[0]]), rows.index(entry["values"][pair[1]])
        mean, below = entry["validation"]["mean"], _below(entry["validation"], _seeds(document) is None)
        means[row, column] = mean
        red, green, blue, _ = colours(norm(mean))
        text: dict[str, Any] = {
            "color": "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.6 else "black",
            "ha": "center", "va": "center",
        }  # fmt: skip
        axes.text(column, row + (0.17 if below else 0), f"{mean:.3f}", fontsize=10, **text)
        axes.text(column, row - 0.22, below, fontsize=8, **text)
        if entry["values"] == document["chosen"]["values"]:
            axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="black", lw=2))
    axes.set_facecolor("#dddddd")
    image = axes.imshow(means, cmap=colours, norm=norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), [_tick(value) for value in columns])
    axes.set_yticks(range(len(rows)), [_tick(value) for value in rows])
    axes.set_xlabel(drawn(pair[0]))
    axes.set_ylabel(drawn(pair[1]))
    if setting:
        axes.set_title(drawn(setting, letters=200), fontsize=10, wrap=True)
    _colour_bar(figure, axes, image, document, baseline_of(entries))
    return figure


def _below(found: Mapping[str, Any], numbered: bool) -> str:
    """Return the text below a mean: its deviation, and the number of seeds if it varies."""
    deviation = [] if found["std"] is None else [f"±{found['std']:.3f}"]
    return ", ".join([*deviation, *([f"n={len(found['values'])}"] if numbered else [])])


def _scale(document: Mapping[str, Any], entries: Configurations) -> tuple[Colormap, Normalize]:
    """Return colours for validation scores: white for labels alone, orange worse, blue better.

    Shades are comparable across maps.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    base = baseline_of(entries)
    if base is None:
        means = [entry["validation"]["mean"] for entry in document["configurations"]]
        ramp = _ramp("#d6e6f2")
        return ramp if better_of(document) > 0 else ramp.reversed(), Normalize(
            min(max(means) - 1e-6, *means), max(means)
        )
    reach = max(
        1e-6,
        *(
            abs(
                entry["validation"]["mean"] - (base if entry["baseline"]["mean"] is None else entry["baseline"]["mean"])
            )
            for entry in document["configurations"]
        ),
    )
    colours = [COLOURS["baseline"], "#ffffff", COLOURS["distilled"]][:: better_of(document)]
    return LinearSegmentedColormap.from_list("kd", colours), Normalize(base - reach, base + reach)


def _ramp(low: str) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("kd", [low, COLOURS["distilled"]])


def _colour_bar(figure: Figure, axes: Axes, image: Any, document: Mapping[str, Any], base: float | None) -> None:
    """Add the used part of the scale, with a mark for the student from labels."""
    bar = figure.colorbar(image, ax=axes, label=_score_label(document))
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
    colours, norm = _scale(document, configurations)
    means = [entry["validation"]["mean"] for entry in configurations]
    image = axes.scatter(x, y, c=means, cmap=colours, norm=norm, s=70, edgecolor="#444444", linewidth=0.6)
    best = document["chosen"]["values"]
    axes.scatter(best[pair[0]], best[pair[1]], s=220, facecolor="none", edgecolor=CHOSEN, linewidth=2)
    axes.set_xscale("log" if _ratios(x) else "linear")
    axes.set_yscale("log" if _ratios(y) else "linear")
    axes.set_xlabel(drawn(pair[0]))
    axes.set_ylabel(drawn(pair[1]))
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
    places: Sequence[Any] = values if parameter["numeric"] else range(len(values))
    if not parameter["numeric"]:
        axes.errorbar(places, means, yerr=spreads, color=colour, marker="s", capsize=4, linestyle="none")
        long = sum(max(map(len, _tick(value).split("\n"))) for value in values) > 40
        turned: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(places, [_tick(value) for value in values], **turned)
        axes.set_xlim(-0.5, len(values) - 0.5)
    elif parameter["searched"]:
        axes.plot(places, means, color=colour, marker="o", linestyle="none", alpha=0.8)
        axes.set_xscale("log" if _ratios(values) else "linear")
    else:
        axes.plot(places, means, color=colour, marker="s", markersize=4, linewidth=1.8)
        low, high = ([mean + sign * s for mean, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(values, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xscale("log" if _ratios(values) else "linear")
        axes.set_xticks(values, [_tick(value) for value in values])
        axes.minorticks_off()
    base = [(place, found["baseline"]) for place, found in zip(places, parameter["values"], strict=True)]
    base = [(place, level) for place, level in base if level is not None]
    if base:
        lined = parameter["numeric"] and not parameter["searched"] and len(base) > 1
        style: dict[str, Any] = (
            {"linestyle": "--", "linewidth": 1.2} if lined else {"linestyle": "none", "marker": "_", "ms": 14}
        )
        x, levels = zip(*base, strict=True)
        axes.plot(x, levels, color=COLOURS["baseline"], label="student from labels", zorder=1, **style)
    if document["teacher"] is not None:
        level = document["teacher"]["validation"]
        axes.axhline(level, color=COLOURS["teacher"], linestyle="--", linewidth=1.2, label="teacher", zorder=1)
    axes.set_xlabel(drawn(parameter["name"]))
    axes.set_ylabel(_score_label(document))
    _legend(axes)
    tidy(axes)
    return figure


def _score_label(document: Mapping[str, Any]) -> str:
    return drawn(f"validation {title_of(document)}")


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0] and axes.figure:
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _ratios(values: Collection[float]) -> bool:
    """Return whether values need a log scale: a wide range with a geometric middle.

    >>> _ratios([1, 2, 4, 8, 16]), _ratios([0.1, 0.3, 0.5, 0.7, 0.9])
    (True, False)
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return low > 0 and high >= 8 * low and abs(middle - math.sqrt(low * high)) < abs(middle - (low + high) / 2)


# -- all of them ------------------------------------------------------------------------------------------------------


def _parallel_figure(document: Mapping[str, Any]) -> Figure:
    """Draw parallel coordinates: each configuration is a line over the parameters and the score."""
    configurations = document["configurations"]
    scales = {parameter["name"]: parameter for parameter in document["parameters"] if len(parameter["values"]) > 1}
    title = f"validation {title_of(document)}"
    columns = {name: [entry["values"][name] for entry in configurations] for name in scales}
    columns[title] = [entry["validation"]["mean"] for entry in configurations]
    heights = {name: _heights(values) for name, values in columns.items()}
    figure = new_figure(max(WIDTH, 1.3 * len(columns)), 3.6)
    axes = figure.add_subplot()
    colours, last = _ramp("#c8c8c8"), heights[title]
    for number in reversed(range(len(configurations))):
        chosen = number == document["chosen"]["rank"]
        colour = CHOSEN if chosen else colours(last[number])
        line = [heights[name][number] for name in columns]
        axes.plot(range(len(columns)), line, color=colour, linewidth=2.6 if chosen else 1.1, zorder=3 if chosen else 2)
    for place, (name, values) in enumerate(columns.items()):
        axes.axvline(place, color="#444444", linewidth=0.8, zorder=1)
        for height, text in _marks(values, heights[name]):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8}
            axes.text(place + 0.03, height, text, fontsize=8, va="center", bbox=box, zorder=4)
    axes.set_xticks(range(len(columns)), [drawn(_broken(visible(name)), keep="\n") for name in columns], fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.spines[:].set_visible(False)
    return figure


def _broken(name: str) -> str:
    r"""Break a name into lines that fit between two scales.

    >>> _broken("teacher.optimizer.lr"), _broken("alpha")
    ('teacher.\noptimizer.lr', 'alpha')
    """
    return re.sub(r"[ .]|(?<=@)", lambda found: f"{found[0].strip()}\n", name, count=1) if len(name) > 14 else name


def _heights(values: Sequence[Value]) -> list[float]:
    """Return values' positions in [0, 1]: texts by order, numbers linear or logarithmic."""
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        order = sorted({label(value) for value in values})
        return [order.index(label(value)) / (len(order) - 1) for value in values]
    if _ratios(numbers):
        numbers = [math.log(number) for number in numbers]
    low, high = min(numbers), max(numbers)
    return [(number - low) / (high - low) if high > low else 0.5 for number in numbers]


def _marks(values: Sequence[Value], heights: Sequence[float]) -> list[tuple[float, str]]:
    """Return the positions of labels: all of a few values, otherwise the ends."""
    marks = dict(sorted(zip(heights, map(_tick, values), strict=True)))
    if len(marks) > 6:
        marks = {height: marks[height] for height in (min(marks), max(marks))}
    return list(marks.items())


def _priced(document: Mapping[str, Any], price: str) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Return the configurations with a known price, and the price, by kind of student.

    Equal students have equal latency: each gets the median over all their points.
    """
    kinds: dict[str, dict[int | None, list[Mapping[str, Any]]]] = {}
    for entry in document["configurations"]:
        chosen = [
            label(value) for name, value in entry["values"].items() if name.startswith(("student", "model@student"))
        ]
        if entry[price]:
            alike = kinds.setdefault(", ".join(chosen) or "distilled student", {})
            alike.setdefault(entry["parameters"], []).append(entry)
    return {
        kind: [
            (statistics.median(each[price] for each in entries), entry)
            for entries in alike.values() for entry in entries
        ]
        for kind, alike in kinds.items()
    }  # fmt: skip


def _prices(document: Mapping[str, Any], price: str) -> list[float]:
    """Return all prices in order, including the teacher's."""
    found = {cost for priced in _priced(document, price).values() for cost, _ in priced}
    teacher = (document["teacher"] or {}).get(price)
    return sorted({*found, teacher} if teacher else found)


def _price_figure(document: Mapping[str, Any], price: str) -> Figure:
    """Draw validation scores against a model's `parameters` or `latency_ms`."""
    figure = new_figure(WIDTH, 3.4)
    axes = figure.add_subplot()
    bases: list[tuple[float, float]] = []
    for number, (kind, priced) in enumerate(_priced(document, price).items()):
        axes.errorbar(
            [cost for cost, _ in priced], [entry["validation"]["mean"] for _, entry in priced],
            yerr=[entry["validation"]["std"] or 0.0 for _, entry in priced], label=drawn(kind), marker="o", capsize=3,
            linestyle="none", color=STUDENTS[number % len(STUDENTS)],
        )  # fmt: skip
        bases += [(cost, e["baseline"]["mean"]) for cost, e in priced if e["baseline"]["mean"] is not None]
    if bases:
        x, y = zip(*bases, strict=True)
        axes.plot(x, y, "_", ms=14, color=COLOURS["baseline"], label="student from labels")
    if (teacher := document["teacher"]) and teacher[price]:
        axes.plot(teacher[price], teacher["validation"], "*", ms=11, color=COLOURS["teacher"], label="teacher")
    axes.set_xscale("log")
    axes.set_xticks(_few(_prices(document, price)))
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: (count if price == "parameters" else short)(value))
    axes.minorticks_off()
    axes.set_xlabel("parameters" if price == "parameters" else "latency of one example, ms")
    axes.set_ylabel(_score_label(document))
    _legend(axes)
    tidy(axes)
    return figure


def _few(values: list[float]) -> list[float]:
    """Return the ascending values whose labels fit on a logarithmic scale."""
    kept, step = values[:1], (values[-1] / values[0]) ** 0.15
    for value in values:
        if value > step * kept[-1]:
            kept.append(value)
    return kept
