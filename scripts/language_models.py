"""Measure what distillation is worth to small language models: perplexity, KL to the teacher, agreement.

python scripts/language_models.py                      everything below; writes results/lm.json
python scripts/language_models.py "lm_sotu, 150,000"   this one; what is trained already is kept
python scripts/language_models.py --picture            nothing, but draw results/lm.png from what is there

Each is one `kd-train` of its own process, as a user runs it: weights are selected on validation, and its report reads
the test addresses once. The student from text alone has the same steps, start and vocabulary, and is also trained for a
quarter of the steps; the better one on validation counts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kd_lightning.evaluation.report.style import COLOURS, MARKERS, new_figure
from kd_lightning.evaluation.report.table import short
from trainings import ROOT, parsed, read_result, report_of, write_result

RUNS, RESULT = ROOT / "runs" / "language_models", ROOT / "results" / "lm.json"
PICTURE = RESULT.with_suffix(".png")
STUDENTS: dict[str, list[str]] = {
    "lm_quickstart": ["experiment=lm_quickstart"],
    "lm_sotu, 50,000": ["experiment=lm_sotu", "data.train_tokens=50000"],
    "lm_sotu, 150,000": ["experiment=lm_sotu", "data.train_tokens=150000"],
    "lm_sotu, 150,000, half the steps": ["experiment=lm_sotu", "data.train_tokens=150000", "trainer.max_epochs=3"],
    "lm_sotu, 600,000": ["experiment=lm_sotu"],
    "lm_cross_tokenizer": ["experiment=lm_cross_tokenizer"],
    "lm_draft": ["experiment=lm_draft"],
}
SEEDS = 3
MODELS = {
    "teacher": "teacher", "baseline": "text alone", "baseline_initialised": "text alone, same start",
    "distilled": "distilled",
}  # fmt: skip
SCORES = {
    "perplexity": "perplexity", "kl_to_teacher": "KL to the teacher", "agreement": "agreement",
    "bits_per_byte": "bits per byte",
}  # fmt: skip


def train(name: str, seeds: int) -> dict[str, Any]:
    """Train a student, and return its report."""
    return report_of([*STUDENTS[name], f"seeds={seeds}"], RUNS / name.replace(",", "").replace(" ", "_"))


def row(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of the students."""
    models = {name: report["models"][name] for name in MODELS if name in report["models"]}
    return {
        "seeds": len(report["seeds"]), "command": report["command"], "environment": report["environment"],
        "splits": report["data"]["splits"], "steps": report["settings"].get("steps"),
        "stages_seconds": report["stages"],
        "warnings": report["warnings"], "differences": report["differences"].get("distilled"),
        "models": {
            name: {
                "test": {score: one["test"].get(score) for score in SCORES}, "draft": one.get("draft"),
                "generation": one.get("generation"), "parameters": one.get("size", {}).get("parameters"),
            }
            for name, one in models.items()
        },
    }  # fmt: skip


def table() -> str:
    """Return docs/language_models.md's table, from results/lm.json."""
    document = read_result(RESULT)
    if not document:
        return "Not measured yet: `python scripts/language_models.py`.\n"
    lines = [
        f"| `experiment=`, training tokens | student | {' | '.join(SCORES.values())} | seeds |",
        "|:--|:--|" + "--:|" * 5,
    ]
    for name, one in document.items():
        for model, title in MODELS.items():
            if model in one["models"]:
                scores = [_written(one["models"][model]["test"][score]) for score in SCORES]
                lines.append(f"| {name} | {title} | {' | '.join(scores)} | {one['seeds']} |")
    return "\n".join(lines) + "\n"


def costs() -> str:
    """Return docs/language_models.md's table of speed and memory, from results/benchmarks/lm_*.json."""
    lines = ["| | median |", "|:--|--:|"]
    for path in sorted((ROOT / "results" / "benchmarks").glob("lm_*.json")):
        for one in json.loads(path.read_text(encoding="utf-8"))["measures"]:
            if one["unit"] in ("ratio", "bytes"):
                lines.append(f"| {one['name']} | {one['median']:.3g} |")
    return "\n".join(lines) + "\n"


def picture(document: dict[str, Any], file: Path = PICTURE) -> None:
    """Draw the distilled students beside those from text alone, from the same start where there is one, by recipe.

    A panel for each score and a row for each recipe; bars are standard deviations over the seeds. What was not measured
    is left out.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    panels = {"perplexity": "perplexity (log scale)", "kl_to_teacher": "KL to the teacher", "agreement": "agreement"}
    figure = new_figure(10, 1.4 + 0.5 * len(document))
    named: set[str] = set()
    for axes, (score, label) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for y, one in enumerate(document.values()):
            start = "baseline_initialised" if "baseline_initialised" in one["models"] else "baseline"
            tests = {name: one["models"].get(name, {}).get("test", {}).get(score) for name in (start, "distilled")}
            known = {name: test for name, test in tests.items() if test and test["mean"] is not None}
            _row_of_dots(axes, y, known, named)
        axes.margins(x=0.4)
        if score == "perplexity":
            axes.set_xscale("log")
        low, high = axes.get_xlim()
        wide = score == "perplexity" and high > 5 * low
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(document)), list(document))
        axes.set_ylim(len(document) - 0.4, -0.8)
        axes.set_xlabel(label)
        axes.minorticks_off()
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle("The same student from text alone and distilled, on held-out text", fontsize=11)
    figure.savefig(file, dpi=150)


def _row_of_dots(axes: Any, y: int, tests: dict[str, dict[str, Any]], named: set[str]) -> None:
    """Draw a recipe's scores, each with its number on the outer side, and with its name where that is new."""
    ordered = sorted(tests, key=lambda name: tests[name]["mean"])
    for name in ordered:
        test, colour, low = tests[name], COLOURS[name], name == ordered[0] and len(ordered) > 1
        bar = test.get("std") or 0.0
        axes.errorbar(test["mean"], y, xerr=bar, color=colour, marker=MARKERS[name], ms=7, capsize=2)
        place = test["mean"] + (-bar if low else bar), y
        given = {"textcoords": "offset points", "color": colour, "ha": "right" if low else "left", "va": "center"}
        axes.annotate(short(test["mean"]), place, xytext=(-7 if low else 7, 0), **given)
        if name not in named:
            named.add(name)
            axes.annotate(MODELS[name], place, xytext=(4 if low else -4, 12), fontsize=9, **given)


def _written(score: dict[str, Any] | None) -> str:
    """Return a score with its deviation over seeds."""
    if score is None or score["mean"] is None:
        return ""
    return f"{score['mean']:.4g}" + (f" ± {score['std']:.2g}" if score.get("std") is not None else "")


def main() -> None:
    """Train, write the results after each run, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--picture", action="store_true")
    given = parsed(parser, list(STUDENTS))
    for name in () if given.picture else given.names:
        write_result(RESULT, row(train(name, given.seeds)), name)
    picture(read_result(RESULT))


if __name__ == "__main__":
    main()
