"""The report's pictures, as matplotlib figures without pyplot's global state."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kd_lightning.evaluation.report.results import monitor, role, score_title
from kd_lightning.evaluation.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    SERIES,
    TITLE,
    End,
    name_lines,
    new_figure,
    spread_out,
    tidy,
)
from kd_lightning.evaluation.report.table import count, short
from kd_lightning.runtime.borders import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 4
"""Of several tasks, those whose calibration is drawn."""


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
    ends: list[End] = []
    teacher = report["models"].get("teacher", {}).get("validation", {}).get(main)
    if teacher and teacher["mean"] is not None:
        title = drawn(report["models"]["teacher"]["title"])
        axes.axhline(teacher["mean"], color=COLOURS["teacher"], linestyle="--", linewidth=1.2, label=title, zorder=1)
        ends.append(End(None, teacher["mean"], title, COLOURS["teacher"]))
    for name, (steps, means, deviations) in points.items():
        start = points["distilled"][0][-1] if name == "finetuned" and "distilled" in points else 0
        x = [start + step for step in steps]
        title = drawn(students[name]["title"])
        axes.plot(
            x, means, label=title, color=COLOURS[role(name)], marker=MARKERS[role(name)], markersize=4, linewidth=1.8
        )
        ends.append(End(x[-1], means[-1], title, COLOURS[role(name)]))
        if any(deviations):
            low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
            high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
            axes.fill_between(x, low, high, color=COLOURS[role(name)], alpha=0.18, linewidth=0)
    seeds = len(report["seeds"])
    spread = f", mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"Learning curves{spread}", fontsize=TITLE)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(drawn(f"validation {score_title(report)}"))
    axes.set_xlim(left=0)
    tidy(axes)
    name_lines(axes, ends)
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
            colour = SERIES[every.index(term) % len(SERIES)]
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
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    return figure


def calibration_figure(report: Mapping[str, Any]) -> Figure | None:
    """Draw how often predictions are right against how sure they are: a panel a task, a line a model.

    A marker's area is the share of the examples; on the diagonal, probabilities are what they claim to be.

    Returns:
        The figure; None if no model predicts classes.
    """
    parts = [part for part in report.get("details", {}).get("parts", ()) if any(_bins(part).values())]
    if not parts:
        return None
    figure = new_figure(max(1.0 + 4.2 * min(len(parts), PANELS), 7.5), 4.2)
    for number, part in enumerate(parts[:PANELS], start=1):
        axes = figure.add_subplot(1, min(len(parts), PANELS), number)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        for name, bins in _bins(part).items():
            colour, title = COLOURS[role(name)], drawn(report["models"][name]["title"])
            if nothing := part["models"][name].get("unpredicted"):
                title += f" ({nothing:,} NaN left out)"
            total = sum(one["examples"] for one in bins)
            x, y = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
            axes.plot(x, y, color=colour, linewidth=1.4, label=title)
            axes.scatter(x, y, s=[12 + 300 * one["examples"] / total for one in bins], color=colour, alpha=0.5)
        axes.set_xlabel("probability of the predicted class")
        axes.set_ylabel("share of predictions that are right")
        axes.set_title(drawn(part["name"]) if part["name"] else "", fontsize=TITLE)
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.03)
        tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bins(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bins of confidence of the models that have some."""
    models = {name: model.get("bins") for name, model in part["models"].items()}
    return {name: models[name] for name in COLOURS if models.get(name)}


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "curves.png": curves_figure,
    "tradeoff.png": tradeoff_figure,
    "shares.png": shares_figure,
    "calibration.png": calibration_figure,
}
"""What draws each picture, by its file's name."""


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
