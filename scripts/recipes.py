"""Measure the recipes, the experiments whose students are held against a goal: five seeds, each beside its baselines.

python scripts/recipes.py                    train all of them (what is trained already is kept); validation scores only
python scripts/recipes.py reviews_bilstm     train this one
python scripts/recipes.py --final [NAME...]  read the test split, once; write results/quality.json

A recipe is a file of conf/experiment, trained with `kd-train experiment=NAME`. Its seeds train here side by side, one
thread each, with one teacher. Weights are selected on validation, and what is in the recipe's file was tried there: no
test figure is computed before --final, which refuses a recipe that is not trained to its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainings import (
    ROOT,
    Job,
    closed,
    gain,
    run_of,
    spread,
    store_outputs,
    teacher_scores,
    test_scores,
    train_all,
    train_run,
    without_traceback,
)

RUNS = ROOT / "runs" / "recipes"
RESULT = ROOT / "results" / "quality.json"
SEEDS = range(5)
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is asked of an experiment.

    Attributes:
        student: In words.
        goal: In words.
        met: Whether what was measured meets it.
        variants: Further distillations by name: what each sets otherwise.
        taught_by: The recipe whose teacher teaches this one; None: its own.
        teacher_key: The setting that takes that teacher.
    """

    student: str
    goal: str
    met: Callable[[Row], bool]
    variants: dict[str, list[str]] = field(default_factory=dict)
    taught_by: str | None = "reviews_bilstm"
    teacher_key: str = "teacher.checkpoint"


def closes(share: float) -> Callable[[Row], bool]:
    """Return whether so much of the gap between baseline and teacher is closed."""
    return lambda row: row["ratio"]["mean"] >= share


def _bilstm(row: Row) -> bool:
    return closes(0.9)(row) and row["distilled"]["mean"] - row["baseline_initialised"]["mean"] >= 0.01


def _layers(row: Row) -> bool:
    kept = row["distilled"]["mean"] / row["teacher"]["mean"]
    return kept >= 0.99 and row["latency_share"] <= 0.55


def _fashion(row: Row) -> bool:
    better, error = gain(row["distilled"]["values"], row["baseline"]["values"])
    features = row["variants"].get(row.get("best_features"))
    best = features is not None and features["test"]["mean"] > row["distilled"]["mean"]
    return better >= 3 * error and best and row["parameters"] <= 60_000


def _multi_task(row: Row) -> bool:
    return row["teacher"]["mean"] - row["distilled"]["mean"] <= 0.01 and row["size_share"] <= 1 / 3


FEATURES = {name: [f"distillation={name}"] for name in ("hint", "similarity_preserving", "pkt")}
MIXED = ["data.mixup_probability=0.3", "data.cutmix_probability=0.3"]
TRANSFER = "data.transfer=[amazon,nyt,tweets]"
RECIPES = {
    "reviews_bilstm": Recipe(
        "BiLSTM of 128, 4.2M parameters (0.3M without embeddings)",
        "ratio >= 0.90, and 1 point above labels with the same initialisation",
        _bilstm,
        {
            "no views": ["data.views=0"],
            "transfer data too": [TRANSFER],
            "transfer data instead of views": ["data.views=0", TRANSFER],
            "fresh embeddings": ["model@student=bilstm"],
            "embeddings of usual size": ["student.scale=1"],
            "a tenth of the steps": ["trainer.max_steps=400"],
        },
    ),
    "reviews_tiny": Recipe("transformer 2 x 128, 4.4M parameters", "ratio >= 0.85", closes(0.85)),
    "reviews_3layer": Recipe(
        "3 layers x 384 of the teacher's",
        "99% of the teacher's accuracy at 55% of its latency",
        _layers,
        {"half as wide": ["student.width=192"]},
    ),
    "reviews_bow": Recipe("convolutions over 1 to 5 words, 4.2M parameters", "ratio >= 0.60", closes(0.6)),
    "fashion_resnet": Recipe(
        "CNN of at most 60k parameters",
        "beats labels by 3 standard errors; the best feature strategy beats plain KD",
        _fashion,
        {**FEATURES, "no views": ["data.views=0"], "mixed views": MIXED},
        taught_by=None,
    ),
    "multi_task": Recipe(
        "one encoder for three tasks",
        "within 1 point of its three teachers on average, at a third of their size",
        _multi_task,
        teacher_key="+tasks.sentiment.teacher.checkpoint",
    ),
}
"""In the order of results/quality.json."""


def teacher_of(name: str) -> Path:
    """Return the run that holds the teacher of a recipe which others share."""
    return RUNS / f"teacher_of_{name}"


def trained_teachers(name: str) -> list[str]:
    """Return what gives another run of a recipe the teachers that its first run trained."""
    recipe, folder = RECIPES[name], RUNS / name / "0"
    own = [] if recipe.taught_by is not None else [f"{recipe.teacher_key}={folder}"]
    tasks = sorted(teacher.parent for teacher in (folder / "tasks").glob("*/teacher"))
    return own + [f"+tasks.{task.name}.teacher.checkpoint={task}" for task in tasks]


def jobs(name: str, more: Sequence[str] = (), variant: str | None = None) -> list[Job]:
    """Return a recipe's runs, or those of a variant, which has no baselines of its own."""
    recipe = RECIPES[name]
    settings = [f"experiment={name}", f"shared_dir={RUNS / 'shared'}", *more]
    if recipe.taught_by is not None:
        settings.append(f"{recipe.teacher_key}={teacher_of(recipe.taught_by)}")
    title, folder = name, RUNS / name
    if variant is not None:
        settings += trained_teachers(name)  # whatever data it learns from
        title, folder = f"{name}, {variant}", RUNS / f"{name}-{variant.replace(' ', '_')}"
        settings.append("stages=[teacher,distill]")
    return [Job(f"{title}, seed {seed}", tuple(settings), folder / str(seed), seed) for seed in SEEDS]


def all_jobs(name: str) -> dict[str | None, list[Job]]:
    """Return a recipe's own runs (None) and those of its variants."""
    return {None: jobs(name)} | {one: jobs(name, more, one) for one, more in RECIPES[name].variants.items()}


def measure(name: str) -> Row:
    """Read the test split for a recipe and say how it did."""
    recipe, found = RECIPES[name], all_jobs(name)
    own = found[None]
    variants = {one: some for one, some in found.items() if one and all(job.is_trained() for job in some)}
    for one in recipe.variants.keys() - variants.keys():
        print(f"{name}, {one}: left out, since it is not trained yet")
    from kd_lightning.pipeline.networks import has_start

    run = run_of(own[0].overrides)
    task, teacher = run.task, run.teacher

    def scores(some: list[Job], stage: str) -> list[dict[str, float]]:
        return [test_scores(job, stage) for job in some]

    def main_of(scored: list[dict[str, float]]) -> dict[str, Any]:
        return spread([one[task.monitor] for one in scored])

    above = teacher_scores(own[0])
    stages = ["baseline", *(["baseline_initialised"] if has_start(run.cfg.student) else [])]
    by_stage = {stage: scores(own, stage) for stage in [*stages, "distill"]}
    row: Row = {
        "student": recipe.student, "taught_by": recipe.taught_by, "metric": task.monitor,
        "teacher": spread([above[task.monitor]]),
        **{stage: main_of(by_stage[stage]) for stage in stages}, "distilled": main_of(by_stage["distill"]),
        "validation": {
            "teacher": spread([teacher_scores(own[0], "validation")[task.monitor]]),
            **{stage: spread([job.validation(stage) for job in own]) for stage in by_stage},
        },
    }  # fmt: skip
    row["ratio"] = closed(row["baseline"]["values"], row["distilled"]["values"], row["teacher"]["mean"])
    if parts := [key for key in above if "/" in key]:
        row["tasks"] = {
            key: {"teacher": above[key]} | {stage: spread([one[key] for one in by_stage[stage]]) for stage in by_stage}
            for key in parts
        }
    row["variants"] = {
        variant: {
            "settings": recipe.variants[variant],
            "validation": spread([job.validation("distill") for job in some]),
            "test": main_of(scores(some, "distill")),
        }
        for variant, some in variants.items()
    }
    if features := FEATURES.keys() & row["variants"].keys():
        row["best_features"] = max(features, key=lambda one: row["variants"][one]["validation"]["mean"])
    row |= _cost(own[0], teacher)
    return row | {"goal": recipe.goal, "met": recipe.met(row), "command": f"kd-train experiment={name}"}


def _cost(job: Job, teacher: Any) -> Row:
    """Return how large and how slow the student is, and as shares of its teacher."""
    from kd_lightning.evaluation.profiling import measure_latency, single_examples, size
    from kd_lightning.training.run_folder import load_run

    student = load_run(job.stage("distill")).network
    networks = [member.network for member in teacher.members] or [teacher.network]
    data = run_of(job.overrides).data
    ours, theirs = (single_examples(data.select(tokens=role).val_dataloader(), 200) for role in ("student", "teacher"))
    latency = measure_latency(
        {"teacher": networks[0], "student": student}, {"teacher": theirs, "student": ours}, threads=1
    )
    sizes = [size(network) for network in networks]
    mine = size(student)
    return {
        "parameters": mine.parameters,
        "parameters_without_embeddings": mine.parameters_without_embeddings,
        "teacher_parameters": sum(one.parameters for one in sizes),
        "size_share": mine.parameters / sum(one.parameters for one in sizes),
        "latency_ms": {name: one.p50 for name, one in latency.items()},
        "latency_share": latency["student"].p50 / latency["teacher"].p50,
    }


def record(names: list[str]) -> None:
    """Write what was measured; recipes that were not asked for keep their rows."""
    from kd_lightning.evaluation.profiling import environment
    from kd_lightning.runtime.files import write_file

    found = {name: all_jobs(name) for name in names}
    needed = [job for some in found.values() for one in (None, *FEATURES) for job in some.get(one, [])]
    if missing := [job.name for job in needed if not job.is_trained()]:
        sys.exit(f"recipes: not trained yet: {', '.join(missing)}; without --final this trains them")
    rows: dict[str, Row] = json.loads(RESULT.read_text(encoding="utf-8"))["recipes"] if RESULT.is_file() else {}
    for name in names:
        row = rows[name] = measure(name) | {"environment": environment()}
        content = {
            "command": "python scripts/recipes.py --final", "seeds": len(SEEDS),
            "recipes": {name: rows[name] for name in RECIPES if name in rows},
        }  # fmt: skip
        write_file(RESULT, json.dumps(content, indent=1) + "\n")
        print(
            f"{name}: teacher {row['teacher']['mean']:.4f}, labels {row['baseline']['mean']:.4f}, distilled "
            f"{row['distilled']['mean']:.4f} ± {row['distilled']['std']:.4f}, ratio {row['ratio']['mean']:.2f}; "
            f"goal ({row['goal']}) {'met' if row['met'] else 'missed'}"
        )
    print(f"wrote {RESULT.relative_to(ROOT)}; now run scripts/update_readme.py")


def train_teacher(name: str, folder: Path, *more: str) -> None:
    """Train the teacher of a recipe in a folder of its own, unless it is there."""
    if not (folder / "teacher" / "stage.json").is_file():
        train_run([f"experiment={name}", "stages=[teacher]", f"run_dir={folder}", *more], quiet=False)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--final", action="store_true", help="read the test split, once, when all is trained")
    given = parser.parse_args()
    if unknown := set(given.names) - set(RECIPES):
        sys.exit(f"recipes: there is no {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    names = given.names or list(RECIPES)
    if given.final:
        record(names)
        return
    for above in {one for name in names if (one := RECIPES[name].taught_by)}:
        train_teacher(above, teacher_of(above))
    found = {name: all_jobs(name) for name in names}
    for name in names:
        for some in found[name].values():
            store_outputs(some[0].overrides)
    train_all([job for name in names for some in found[name].values() for job in some])


if __name__ == "__main__":
    without_traceback(main)
