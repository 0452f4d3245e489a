"""Measure what the defaults are worth on several sets: `kd-train` with nothing set but data, goal and budget.

python scripts/defaults.py                       every set and goal; writes results/defaults.json
python scripts/defaults.py reviews/small         this one; what is trained already is kept
python scripts/defaults.py --budget quick        the quick budget

Each is one `kd-train` of its own process, as a user runs it: weights are selected on validation, and its report reads
the test split once. The goals of a set have its teacher in common. The defaults were chosen on validation splits.
"""

from __future__ import annotations

import argparse
from typing import Any

from trainings import ROOT, parsed, percent, read_result, report_of, write_result

RUNS, RESULT = ROOT / "runs" / "defaults", ROOT / "results" / "defaults.json"
SETS: dict[str, list[str]] = {
    "reviews": ["data=reviews"],
    "reviews, 1,000 labels": ["data=reviews", "data.train_examples=1000", "data.transfer_examples=null"],
    "debian_sections, 10,000 labels": ["data=debian_sections", "data.train_examples=10000"],
    "debian_sections, 1,000 labels": [
        "data=debian_sections", "data.train_examples=1000", "data.transfer_examples=10000",
    ],
    "sotu_eras": ["data=sotu_eras"],
    "fashion_mnist": ["data=fashion_mnist"],
}  # fmt: skip
GOALS = {name: ("small",) if name == "fashion_mnist" else ("small", "fast") for name in SETS}
SEEDS = {"small": 5, "fast": 3}
MODELS = ("teacher", "baseline", "baseline_initialised", "distilled")


def names() -> list[str]:
    """Return what there is to measure: SET/GOAL."""
    return [f"{name}/{goal}" for name in SETS for goal in GOALS[name]]


def train(name: str, budget: str, seeds: int) -> dict[str, Any]:
    """Train a set for a goal, and return the run's report."""
    data, goal = name.rsplit("/", 1)
    folder = RUNS / budget / data.replace(",", "").replace(" ", "_")
    settings = [*SETS[data], f"goal={goal}", f"budget={budget}", f"seeds={seeds}", f"shared_dir={folder / 'shared'}"]
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
        "from the same start | minutes of all seeds (estimated) |",
        "| :-- | :-- |" + " --: |" * 8,
    ]
    for budget, rows in document.items():
        for name, one in rows.items():
            scores = [percent(one.get(model)) for model in MODELS]
            cores = f"{one['environment']['threads']} core{'s' * (one['environment']['threads'] > 1)}"
            took = f"{one['seconds'] / 60:.0f} ({one['estimated_seconds'] / 60:.0f}), {cores}" if one["seconds"] else ""
            shares = [_share(one["ratio"]), _share(one["ratio_same_start"])]
            lines.append(
                f"| {name.replace('/', ', ')} | {budget} | {one['seeds']} | {' | '.join([*scores, *shares, took])} |"
            )
    return "\n".join(lines) + "\n"


def _share(ratio: dict[str, Any]) -> str:
    return "" if ratio["mean"] is None else f"{ratio['mean']:.2f}"


def main() -> None:
    """Train and write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="standard", choices=("quick", "standard", "best"))
    parser.add_argument("--seeds", type=int, help="fewer or more seeds than the goal's")
    given = parsed(parser, names())
    for name in given.names:
        report = train(name, given.budget, given.seeds or SEEDS[name.rsplit("/", 1)[1]])
        more = {"command": report["command"], "environment": report["environment"]}
        write_result(RESULT, row(report) | more, given.budget, name)


if __name__ == "__main__":
    main()
