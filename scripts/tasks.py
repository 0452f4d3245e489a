"""Measure one experiment of each further kind of task: teacher, the student from its data alone, distilled.

python scripts/tasks.py            all that is below; writes results/tasks.json
python scripts/tasks.py ner_pii    this one; what is trained already is kept

Each is one `kd-train` of its own process, as a user runs it: weights are selected on validation, and its report reads
the test split once.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from kd_lightning.evaluation.report.table import count, short
from trainings import ROOT, parsed, percent, read_result, report_of, write_result, written

RUNS, RESULT = ROOT / "runs" / "tasks", ROOT / "results" / "tasks.json"
TASKS = {
    "ner_pii": ("token classification", ["experiment=ner_pii"]),
    "embed_debian, static": (
        "sentence embedding",
        ["experiment=embed_debian", "model@student=static_embedding", "data.batch_size=64", "trainer.max_steps=1500"],
    ),
    "embed_debian": ("sentence embedding", ["experiment=embed_debian"]),
    "embed_debian, 2 layers": ("sentence embedding", ["experiment=embed_debian", "student.layers=2"]),
    "embed_debian, 1 layer": ("sentence embedding", ["experiment=embed_debian", "student.layers=1"]),
    "qa_debian": ("question answering", ["experiment=qa_debian"]),
    "rank_debian": ("ranking", ["experiment=rank_debian"]),
    "rank_debian, margins": ("ranking", ["experiment=rank_debian", "distillation=margin_mse_scores"]),
    "masked_general": ("masked language modelling", ["experiment=masked_general"]),
    "rank_debian, cross-encoder": (
        "ranking", ["experiment=rank_debian", "model@student=from_teacher", "student.layers=3"],
    ),
}  # fmt: skip
"""What is trained: the kind of task, and the settings."""
CALLED = {
    "entity_f1": "entity F1", "f1": "F1", "ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "cross_entropy": "cross-entropy",
}  # fmt: skip
"""Scores as papers write them; others are written as they are."""
SEEDS = 5
MODELS = ("teacher", "baseline", "baseline_initialised", "distilled")


def row(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of teacher and students."""
    monitor, models = report["data"]["monitor"], report["models"]
    return {
        "monitor": monitor, "seeds": len(report["seeds"]), "splits": report["data"]["splits"],
        "ratio": report["distillation_ratio"], "differences": report["differences"]["distilled"],
        "models": {
            name: {
                "test": models[name]["test"][monitor], "size": models[name]["size"],
                "latency_ms": models[name]["latency_ms"],
            }
            for name in MODELS if name in models
        },
        "stages_seconds": report["stages"], "warnings": report["warnings"], "command": report["command"],
        "environment": report["environment"],
    }  # fmt: skip


def cells(one: dict[str, Any]) -> list[str]:
    """Return what the selecting score is called, and that of each model: a cross-entropy in nats, others in percent."""
    monitor = one["monitor"]
    scores = (one["models"].get(model, {}).get("test") for model in MODELS)
    write = partial(written, write="{:.3f}".format) if monitor == "cross_entropy" else percent
    return [CALLED.get(monitor, monitor), *map(write, scores)]


def sizes(teacher: int | None, student: int | None) -> str:
    """Return both numbers of parameters; nothing where one is not known."""
    return "" if teacher is None or student is None else f"{count(teacher)} → {count(student)}"


def table(kind: str) -> str:
    """Return a page's table of a kind of task, from results/tasks.json."""
    document = {name: one for name, one in read_result(RESULT).items() if TASKS[name][0] == kind}
    if not document:
        return "Not measured yet: `python scripts/tasks.py`.\n"
    lines = [
        "| `experiment=` | score | teacher | from its data alone | ... same start | distilled | gap closed | "
        "parameters | latency, ms |",
        "| :-- | :-- |" + " --: |" * 7,
    ]
    for name, one in document.items():
        gap = "" if one["ratio"]["mean"] is None else f"{one['ratio']['mean']:.2f}"
        ends = [one["models"]["teacher"], one["models"]["distilled"]]
        parameters = sizes(*(model["size"]["parameters"] for model in ends))
        speeds = " → ".join(short(model["latency_ms"]["p50"]) for model in ends)
        lines.append(f"| `{name}` | {' | '.join(cells(one))} | {gap} | {parameters} | {speeds} |")
    seeds = ", ".join(f"{name} {one['seeds']}" for name, one in document.items())
    machine = next(iter(document.values()))["environment"]
    unit = "in nats a token" if "cross_entropy" in {one["monitor"] for one in document.values()} else "in %"
    return "\n".join(lines) + (
        f"\n\nScores of the test split {unit}; seeds: {seeds}; on {machine['cpu']} with {machine['cores']} cores "
        "(`results/tasks.json`).\n"
    )


def main() -> None:
    """Train and write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parsed(parser, list(TASKS))
    for name in given.names:
        settings = [*TASKS[name][1], f"seeds={given.seeds}"]
        write_result(RESULT, row(report_of(settings, RUNS / name.replace(", ", "_"))), name)


if __name__ == "__main__":
    main()
