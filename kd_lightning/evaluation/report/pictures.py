"""The report's pictures, as matplotlib figures without pyplot's global state."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.evaluation.report.results import monitor, role, score_title
from kd_lightning.evaluation.report.table import count, short
from kd_lightning.runtime.borders import drawn

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

TERM_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


def curves_figure(report: Mapping[str, Any]) -> Figure | None:
    """Draw the validation score against optimizer steps, a line per student.

    A line is the mean over the seeds, with a band of one standard deviation. The teacher is a dashed line at its
    validation score. The fine-tuned student starts where the distilled one ended.

    Returns:
        The figure; None if no student has a learning curve.
    """
    students = {name: model for name, model in report["models"].items() if name != "teacher" and model["curves"]}
    points = {name: mean_curve(model["curves"]) for name, model in students.items()}
    points = {name: curve for name, curve in points.items() if curve[0]}
    if not points:
        return None
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    main = monitor(report)
    teacher = report["models"].get("teacher", {}).get("validation", {}).get(main)
    if teacher and teacher["mean"] is not None:
        title = drawn(report["models"]["teacher"]["title"])
        axes.axhline(teacher["mean"], color=COLOURS["teacher"], linestyle="--", linewidth=1.2, label=title, zorder=1)
    for name, (steps, means, deviations) in points.items():
        start = points["distilled"][0][-1] if name == "finetuned" and "distilled" in points else 0
        x = [start + step for step in steps]
        title = drawn(students[name]["title"])
        axes.plot(
            x, means, label=title, color=COLOURS[role(name)], marker=MARKERS[role(name)], markersize=4, linewidth=1.8
        )
        if any(deviations):
            low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
            high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
            axes.fill_between(x, low, high, color=COLOURS[role(name)], alpha=0.18, linewidth=0)
    seeds = len(report["seeds"])
    spread = f", mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"Learning curves{spread}", fontsize=11)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(drawn(f"validation {score_title(report)}"))
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)  # never over a line
    tidy(axes)
    return figure


def tradeoff_figure(report: Mapping[str, Any]) -> Figure | None:
    """Draw the test score against parameters and against batch-1 latency, with a label at each model.

    Error bars are one standard deviation over the seeds.

    Returns:
        The figure; None if neither size nor latency was measured.
    """
    panels = [
        ("size", "parameters", "parameters (log scale)", count),
        ("latency_ms", "p50", "latency of one example, ms (log scale)", short),
    ]
    panels = [panel for panel in panels if any(model[panel[0]] for model in report["models"].values())]
    if not panels:
        return None
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(1.0 + 4.2 * len(panels), 4.0)
    first = None
    for number, (section, key, label, write) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number, sharey=first)
        first = first or axes
        _tradeoff_panel(axes, report, section, key)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(_tick_writer(write))
        axes.xaxis.set_minor_locator(NullLocator())
        tidy(axes)
    figure.axes[0].set_ylabel(drawn(f"test {score_title(report)}"))
    for axes in figure.axes[1:]:
        axes.tick_params(labelleft=False)
    return figure


def shares_figure(report: Mapping[str, Any]) -> Figure | None:
    """Draw each loss term's share of the gradient, and of the weighted loss, against optimizer steps.

    A line is the mean over the seeds.

    Returns:
        The figure; None if the distilled student's terms were not logged.
    """
    curves = report["models"].get("distilled", {}).get("curves", [])
    panels = {
        label: {term: [curve[key][term] for curve in curves if term in curve[key]] for term in _terms(curves, key)}
        for label, key in (("gradient", "gradient_share"), ("weighted loss", "loss_share"))
        if _terms(curves, key)
    }
    if not panels:
        return None
    figure = new_figure(1.0 + 4.2 * len(panels), 3.8)
    every = list(dict.fromkeys(term for terms in panels.values() for term in terms))
    for number, (label, terms) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for term, seeds in terms.items():
            steps, means, _ = mean_series(seeds)
            colour = TERM_COLOURS[every.index(term) % len(TERM_COLOURS)]
            marker = "o" if len(steps) < 30 else ""
            axes.plot(
                steps, [100 * mean for mean in means], label=drawn(term), color=colour, marker=marker, markersize=4
            )
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(f"share of the {label}, %")
        axes.set_ylim(-2, 102)
        axes.set_xlim(left=0)
        tidy(axes)
    handles, labels = max((axes.get_legend_handles_labels() for axes in figure.axes), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=10)
    return figure


def mean_curve(curves: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float], list[float]]:
    """Return `mean_series` of the validation score in the curves of one model's entry in the report."""
    return mean_series([curve["validation_score"] for curve in curves])


def mean_series(series: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float], list[float]]:
    """Return steps, mean and sample standard deviation over the steps that all seeds have.

    Args:
        series: `steps` and `values`, one for each seed.

    Returns:
        Three lists of equal length; the deviations are 0 for one seed.
    """
    seeds = []
    for points in series:
        pairs = zip(points["steps"], points["values"], strict=True)
        seeds.append({step: value for step, value in pairs if value is not None})
    if not seeds:
        return [], [], []
    steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
    values = [[seed[step] for seed in seeds] for step in steps]
    means = [statistics.fmean(row) for row in values]
    return steps, means, [statistics.stdev(row) if len(row) > 1 else 0.0 for row in values]


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


def _tradeoff_panel(axes: Axes, report: Mapping[str, Any], section: str, key: str) -> None:
    """Plot every measured model on a panel, with its title."""
    main = monitor(report)
    points = [
        (name, model, model[section][key], model["test"][main])
        for name, model in report["models"].items()
        if model[section] and model["test"][main]["mean"] is not None
    ]
    xs = [x for _, _, x, _ in points]
    ys = [score["mean"] for *_, score in points]
    deviations = [score["std"] or 0.0 for *_, score in points]
    for (name, _, x, _), y, deviation in zip(points, ys, deviations, strict=True):
        size = 13 if MARKERS[role(name)] == "*" else 8
        axes.errorbar(
            x, y, yerr=deviation or None, color=COLOURS[role(name)], marker=MARKERS[role(name)], markersize=size,
            capsize=3, linestyle="none"
        )  # fmt: skip
    axes.set_xscale("log")
    low = min(y - d for y, d in zip(ys, deviations, strict=True))
    high = max(y + d for y, d in zip(ys, deviations, strict=True))
    margin = max(0.15 * (high - low), 0.005)
    axes.set_ylim(low - margin, high + margin)
    left, right = math.log10(min(xs)), math.log10(max(xs))
    room = max(0.35 * (right - left), 0.4)
    axes.set_xlim(10 ** (left - room / 2), 10 ** (right + room / 2))
    heights = spread_out(ys, gap=0.075 * (high - low + 2 * margin))
    for (name, model, x, _), height in zip(points, heights, strict=True):
        on_right = math.log10(x) > (left + right) / 2
        axes.annotate(
            drawn(model["title"]), (x, height), xytext=(-9 if on_right else 9, 0), textcoords="offset points",
            color=COLOURS[role(name)], horizontalalignment="right" if on_right else "left", verticalalignment="center",
            fontsize=10,
            bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5},
        )  # fmt: skip


def _terms(curves: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the terms whose shares are in the curves."""
    return list(dict.fromkeys(term for curve in curves for term in curve.get(key, ())))


def _tick_writer(write: Callable[[float], str]) -> Callable[[float, float], str]:
    """Adapt a number format to matplotlib's ticks, where 10.0M becomes 10M."""
    return lambda value, _position: re.sub(r"\.0+(?=\D|$)", "", write(value))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure with constrained layout; sizes in inches."""
    from matplotlib.figure import Figure  # takes most of a second, and is only needed here

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes) -> None:
    """Remove the axes' superfluous lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
