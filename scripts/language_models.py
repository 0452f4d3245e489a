"""Measure what distillation is worth to small language models: perplexity, KL to the teacher, agreement.

python scripts/language_models.py                      everything below; writes results/lm.json
python scripts/language_models.py "lm_sotu, 150,000"   this one; what is trained already is kept

Each is one `kd-train` of its own process, as a user runs it: weights are selected on validation, and its report reads
the test addresses once. The student from text alone has the same steps, start and vocabulary, and is also trained for a
quarter of the steps; the better one on validation counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from trainings import ROOT, report_of

RUNS, RESULT = ROOT / "runs" / "language_models", ROOT / "results" / "lm.json"
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
                "generation": one.get("generation"), "parameters": one.get("parameters"),
            }
            for name, one in models.items()
        },
    }  # fmt: skip


def table() -> str:
    """Return docs/language_models.md's table, from results/lm.json."""
    if not RESULT.is_file():
        return "Not measured yet: `python scripts/language_models.py`.\n"
    lines = [
        f"| `experiment=`, training tokens | student | {' | '.join(SCORES.values())} | seeds |",
        "|:--|:--|" + "--:|" * 5,
    ]
    for name, one in json.loads(RESULT.read_text(encoding="utf-8")).items():
        for model, title in MODELS.items():
            if model in one["models"]:
                scores = [_written(one["models"][model]["test"][score]) for score in SCORES]
                lines.append(f"| {name} | {title} | {' | '.join(scores)} | {one['seeds']} |")
    return "\n".join(lines) + "\n"


def quickstart() -> str:
    """Return README.md's sentence about `experiment=lm_quickstart`, from results/lm.json."""
    document = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    if "lm_quickstart" not in document:
        return "Not measured yet: `python scripts/language_models.py`.\n"
    one = document["lm_quickstart"]
    tests = {name: model["test"] for name, model in one["models"].items()}
    start = "baseline_initialised" if "baseline_initialised" in tests else "baseline"
    perplexity, kl, same = (
        {name: test[score] and test[score]["mean"] for name, test in tests.items()}
        for score in ("perplexity", "kl_to_teacher", "agreement")
    )
    minutes, machine = sum(one["stages_seconds"].values()) / 60, one["environment"]
    return (
        f"On held-out State of the Union addresses the distilled student has a perplexity of "
        f"{perplexity['distilled']:.0f}, the same student from text alone {perplexity[start]:.0f} (the teacher "
        f"{perplexity['teacher']:.0f}). Its KL to the teacher is {kl['distilled']:.2f} nats a token, of the other "
        f"{kl[start]:.2f}. Its likeliest token is the teacher's for {100 * same['distilled']:.0f}% of tokens, of the "
        f"other for {100 * same[start]:.0f}%. Measured with {one['seeds']} seed{'s' * (one['seeds'] > 1)} in "
        f"{minutes:.0f} minutes on {machine['cpu']} with {machine['cores']} cores (`results/lm.json`).\n"
    )


def costs() -> str:
    """Return docs/language_models.md's table of speed and memory, from results/benchmarks/lm_*.json."""
    lines = ["| | median |", "|:--|--:|"]
    for path in sorted((ROOT / "results" / "benchmarks").glob("lm_*.json")):
        for one in json.loads(path.read_text(encoding="utf-8"))["measures"]:
            if one["unit"] in ("ratio", "bytes"):
                lines.append(f"| {one['name']} | {one['median']:.3g} |")
    return "\n".join(lines) + "\n"


def _written(score: dict[str, Any] | None) -> str:
    """Return a score with its deviation over seeds."""
    if score is None or score["mean"] is None:
        return ""
    return f"{score['mean']:.4g}" + (f" ± {score['std']:.2g}" if score.get("std") is not None else "")


def main() -> None:
    """Train and write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(STUDENTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in STUDENTS]:
        sys.exit(f"language_models: there is no {unknown[0]!r}; there are {'; '.join(STUDENTS)}")
    document = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for name in given.names or STUDENTS:
        document[name] = row(train(name, given.seeds))
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
