"""The pictures of a sweep's report, narrow enough for a phone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.evaluation.report.style import COLOURS, SERIES, new_figure, tidy
from kd_lightning.evaluation.report.sweep.axes import (
    CHOSEN,
    WIDTH,
    baseline_name,
    label,
    ramp,
    ratios,
    score_label,
    tick,
)
from kd_lightning.evaluation.report.sweep.maps import maps
from kd_lightning.evaluation.report.sweep.points import Value, title_of
from kd_lightning.evaluation.report.table import count, short
from kd_lightning.runtime.borders import drawn, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRICES = (
    ("size", "parameters", "Validation score against the number of parameters."),
    (
        "latency",
        "latency_ms",
        "Validation score against the latency of one example: the median over a student's points.",
    ),
)
"""The costs of accuracy: a file name, the key of a configuration, a caption."""
STUDENTS = [colour for colour in SERIES if colour not in (COLOURS["baseline"], COLOURS["teacher"])]


def figures(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Draw the pictures that the sweep's parameters allow.

    Args:
        document: What `build_sweep` returns.

    Yields:
        A file name without its suffix, a caption, and the figure.
    """
    if not document["configurations"]:
        return
    yield from maps(document)
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
        long = sum(max(map(len, tick(value).split("\n"))) for value in values) > 40
        turned: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(places, [tick(value) for value in values], **turned)
        axes.set_xlim(-0.5, len(values) - 0.5)
    elif parameter["searched"]:
        axes.plot(places, means, color=colour, marker="o", linestyle="none", alpha=0.8)
        axes.set_xscale("log" if ratios(values) else "linear")
    else:
        axes.plot(places, means, color=colour, marker="s", markersize=4, linewidth=1.8)
        low, high = ([mean + sign * s for mean, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(values, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xscale("log" if ratios(values) else "linear")
        axes.set_xticks(values, [tick(value) for value in values])
        axes.minorticks_off()
    base = [(place, found["baseline"]) for place, found in zip(places, parameter["values"], strict=True)]
    base = [(place, level) for place, level in base if level is not None]
    if base:
        lined = parameter["numeric"] and not parameter["searched"] and len(base) > 1
        style: dict[str, Any] = (
            {"linestyle": "--", "linewidth": 1.2} if lined else {"linestyle": "none", "marker": "_", "ms": 14}
        )
        x, levels = zip(*base, strict=True)
        axes.plot(x, levels, color=COLOURS["baseline"], label=baseline_name(document), zorder=1, **style)
    if document["teacher"] is not None:
        level = document["teacher"]["validation"]
        axes.axhline(level, color=COLOURS["teacher"], linestyle="--", linewidth=1.2, label="teacher", zorder=1)
    axes.set_xlabel(drawn(parameter["name"]))
    axes.set_ylabel(score_label(document))
    _legend(axes)
    tidy(axes)
    return figure


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0] and axes.figure:
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)


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
    colours, last = ramp("#c8c8c8"), heights[title]
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
    if ratios(numbers):
        numbers = [math.log(number) for number in numbers]
    low, high = min(numbers), max(numbers)
    return [(number - low) / (high - low) if high > low else 0.5 for number in numbers]


def _marks(values: Sequence[Value], heights: Sequence[float]) -> list[tuple[float, str]]:
    """Return the positions of labels: all of a few values, otherwise the ends."""
    marks = dict(sorted(zip(heights, map(tick, values), strict=True)))
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
        axes.plot(x, y, "_", ms=14, color=COLOURS["baseline"], label=baseline_name(document))
    if (teacher := document["teacher"]) and teacher[price]:
        axes.plot(teacher[price], teacher["validation"], "*", ms=11, color=COLOURS["teacher"], label="teacher")
    axes.set_xscale("log")
    axes.set_xticks(_few(_prices(document, price)))
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: (count if price == "parameters" else short)(value))
    axes.minorticks_off()
    axes.set_xlabel("parameters" if price == "parameters" else "latency of one example, ms")
    axes.set_ylabel(score_label(document))
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
