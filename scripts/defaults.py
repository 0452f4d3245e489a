"""Measure what the defaults are worth on several sets: `kd-train` with nothing set but data, goal and budget.

python scripts/defaults.py                       every set and goal; writes results/defaults.json
python scripts/defaults.py reviews/small         this one; what is trained already is kept
python scripts/defaults.py --budget quick        the quick budget
python scripts/defaults.py --picture             draw results/defaults.png from what was measured, as each run does

Each is one `kd-train` of its own process, as a user runs it: weights are selected on validation, and its report reads
the test split once. The goals of a set have its teacher in common. The defaults were chosen on validation splits.
"""

from __future__ import annotations

import argparse
from typing import Any

from kd_lightning.evaluation.report.style import COLOURS, MARKERS, SMALL, TITLE, End, name_lines, new_figure, tidy
from trainings import ROOT, parsed, percent, read_result, report_of, write_result, written

RUNS, RESULT = ROOT / "runs" / "defaults", ROOT / "results" / "defaults.json"


def few(data: str, labels: int, texts: int | None) -> list[str]:
    """Return the configuration of a set with so many labels, and so many (`None`: all) of its other texts."""
    rest = "null" if texts is None else texts
    return [f"data={data}", f"data.train_examples={labels}", f"data.transfer_examples={rest}"]


SETS: dict[str, list[str]] = {
    "reviews": ["data=reviews"],
    "reviews, 1,000 labels": few("reviews", 1000, None),
    "debian_sections, 10,000 labels": few("debian_sections", 10_000, 0),
    "debian_sections, 1,000 labels": few("debian_sections", 1000, 10_000),
    "sotu_eras": ["data=sotu_eras"],
    "fashion_mnist": ["data=fashion_mnist"],
}
MORE = {
    "reviews, 300 labels": few("reviews", 300, None),
    "reviews, 3,000 labels": few("reviews", 3000, None),
    "debian_sections, 300 labels": few("debian_sections", 300, 10_000),
    "debian_sections, 3,000 labels": few("debian_sections", 3000, 10_000),
}
"""For the picture alone, and the small student."""
GOALS = {name: ("small", "fast") if name in SETS and name != "fashion_mnist" else ("small",) for name in SETS | MORE}
SEEDS = {"small": 5, "fast": 3}
MODELS = ("teacher", "baseline", "baseline_initialised", "distilled")
PANELS = {"reviews": "movie reviews, 2 classes", "debian_sections": "descriptions of packages, 24 classes"}
LINES = {
    "teacher": ("teacher", ":"),
    "baseline": ("labels alone", "--"),
    "baseline_initialised": ("labels, the teacher's word embeddings", "-."),
    "distilled": ("distilled: the teacher labels all texts", "-"),
}


def names() -> list[str]:
    """Return what there is to measure: SET/GOAL."""
    return [f"{name}/{goal}" for name in SETS | MORE for goal in GOALS[name]]


def train(name: str, budget: str, seeds: int) -> dict[str, Any]:
    """Train a set for a goal, and return the run's report."""
    data, goal = name.rsplit("/", 1)
    folder = RUNS / budget / data.replace(",", "").replace(" ", "_")
    settings = [
        *(SETS | MORE)[data],
        f"goal={goal}",
        f"budget={budget}",
        f"seeds={seeds}",
        f"shared_dir={folder / 'shared'}",
    ]
    return report_of(settings, folder / goal)


def row(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of the defaults."""
    monitor, models = report["data"]["monitor"], report["models"]
    scores = {name: models[name]["test"][monitor] for name in MODELS if name in models}
    kept = scores["distilled"]["mean"] / scores["teacher"]["mean"]
    settings = report["settings"]
    return {
        "monitor": monitor, **scores, "share_of_teacher": kept, "ratio": report["distillation_ratio"],
        "ratio_same_start": report["distillation_ratio_same_start"],
        "differences": report["differences"]["distilled"], "seeds": len(report["seeds"]),
        "calibration": models["teacher"]["validation"].get(report["data"]["calibration"], {}).get("mean"),
        **{key: settings.get(key) for key in ("steps", "baseline_steps", "estimated_seconds", "seconds")},
        "stages_seconds": report["stages"], "splits": report["data"]["splits"], "warnings": report["warnings"],
    }  # fmt: skip


def table() -> str:
    """Return docs/levers.md's table of the defaults, from results/defaults.json."""
    document = read_result(RESULT)
    if not document:
        return "Not measured yet: `python scripts/defaults.py`.\n"
    lines = [
        "| data, goal | budget | seeds | teacher | from labels | same start | distilled | gap closed | "
        "from the same start | minutes of all seeds |",
        "| :-- | :-- |" + " --: |" * 8,
    ]
    for budget, rows in document.items():
        for name, one in rows.items():
            scores = [percent(one.get(model)) for model in MODELS]
            cores = f"{one['environment']['threads']} core{'s' * (one['environment']['threads'] > 1)}"
            took = f"{one['seconds'] / 60:.0f}, {cores}" if one["seconds"] else ""
            shares = [written(one[ratio], lambda value: f"{value:.2f}") for ratio in ("ratio", "ratio_same_start")]
            lines.append(
                f"| {name.replace('/', ', ')} | {budget} | {one['seeds']} | {' | '.join([*scores, *shares, took])} |"
            )
    return "\n".join(lines) + "\n"


def picture() -> None:
    """Draw the small student's accuracy by the number of labels, for the sets where it was measured for several."""
    measured = read_result(RESULT).get("standard", {})
    figure = new_figure(11, 4.2)
    for axes, (data, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        rows = [row for name, row in measured.items() if name.split(",")[0].split("/")[0] == data and "/small" in name]
        rows.sort(key=lambda row: row["splits"]["train"])
        labels = [row["splits"]["train"] for row in rows]
        ends = []
        for model, (line, dash) in LINES.items():
            scores = [row[model] for row in rows]
            y, bars = ([100 * (score[key] or 0) for score in scores] for key in ("mean", "std"))
            style = {"color": COLOURS[model], "marker": MARKERS[model], "linestyle": dash}
            axes.errorbar(labels, y, bars, markersize=5, capsize=3, label=line, **style)
            ends += [End(labels[-1], y[-1], f"{y[-1]:.1f}", COLOURS[model])] if y else []
        axes.set_xscale("log")
        axes.set_xticks(labels, [f"{count:,}" for count in labels])
        axes.minorticks_off()
        axes.set_title(title, fontsize=TITLE)
        axes.set_xlabel("labelled texts; the teacher labels up to 10,000 others")
        axes.set_ylabel("test accuracy, %" if axes.get_subplotspec().is_first_col() else "")
        tidy(axes)
        name_lines(axes, ends)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, fontsize=SMALL, frameon=False, loc="outside lower center", ncols=len(LINES))
    figure.savefig(RESULT.with_suffix(".png"), dpi=150)


def main() -> None:
    """Train and write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="standard", choices=("quick", "standard", "best"))
    parser.add_argument("--seeds", type=int, help="fewer or more seeds than the goal's")
    parser.add_argument("--picture", action="store_true", help="draw what was measured, and train nothing")
    given = parsed(parser, names())
    for name in [] if given.picture else given.names:
        report = train(name, given.budget, given.seeds or SEEDS[name.rsplit("/", 1)[1]])
        more = {"command": report["command"], "environment": report["environment"]}
        write_result(RESULT, row(report) | more, given.budget, name)
    picture()


if __name__ == "__main__":
    main()
