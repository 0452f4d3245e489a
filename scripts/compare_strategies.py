"""Train one student with every text strategy at equal budget, and write what each is worth.

python scripts/compare_strategies.py                    all of them: results/strategies.json and results/strategies.png
python scripts/compare_strategies.py soft_target dkd    only these, into the same folders (nothing is trained twice);
                                                        of them validation scores only
python scripts/compare_strategies.py --teacher runs/reviews_bilstm    with a teacher that is there already

One student (a transformer of 2 layers, with as many heads as the teacher, since some strategies need that), one teacher
(MiniLM fine-tuned on the reviews, as in experiment=quickstart, asked once for everything that any strategy reads), the
same steps, learning rate, alpha and temperature for all: no strategy is tuned, each has the weights of its file. The
weights of a run are selected on validation; the test split is read once, when the runs of all strategies are done.
"""

from __future__ import annotations

import argparse
import atexit
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from kd_lightning.evaluation.report.style import COLOURS, MARKERS, SMALL, TITLE, Dot, dots, new_figure
from trainings import (
    ROOT,
    Job,
    run_of,
    spread,
    store_outputs,
    teacher_scores,
    test_scores,
    train_all,
    train_run,
    without_traceback,
)

RUNS = ROOT / "runs" / "strategies"
SEEDS = (0, 1, 2)
SIZES = {"hidden_size": 144, "num_layers": 2, "num_heads": 12, "intermediate_size": 576}
STUDENT = ["model@student=transformer", *(f"student.{name}={size}" for name, size in SIZES.items())]
BACKBONE = ["_target_: kd_lightning.models.transformer.transformer", "_partial_: true"]
BACKBONE += [f"{name}: {size}" for name, size in SIZES.items()]
SPECIAL = {
    "deep_mutual": [*STUDENT, "peers=['${student}']"],
    "simkd": ["model@student=simkd", "~student.backbone", f"+student.backbone={{{', '.join(BACKBONE)}}}"],
}
"""What a strategy's student has besides."""
BUDGET = [
    "trainer.max_steps=500",
    "data.batch_size=32",
    "optimizer.lr=1e-3",
    "validations=6",
    "temperature=2",
    "alpha=0.9",
]


def overrides(strategy: str, teacher: str, features: list[str]) -> list[str]:
    """Return the configuration of one strategy's runs but for the seed."""
    kept = ",".join(f'"{name}"' for name in features)
    return [
        "experiment=quickstart", "data.views=0", "data.transfer=[]", *SPECIAL.get(strategy, STUDENT), *BUDGET,
        f"distillation={strategy}", f"teacher.checkpoint={teacher}", f"teacher.features=[{kept}]",
        "teacher.cache_dtype=float16", "stages=[distill]",
    ]  # fmt: skip


def job(strategy: str, seed: int, settings: list[str]) -> Job:
    """Return the training of one strategy with one seed, in a folder of its own, since seeds train side by side."""
    return Job(f"{strategy}, seed {seed}", tuple(settings), RUNS / strategy / str(seed), seed)


def needed(names: list[str], teacher: str) -> list[str]:
    """Return every feature of the teacher that any of the strategies reads."""
    from kd_lightning.pipeline.networks import build_network
    from kd_lightning.pipeline.objectives import run_objective

    found: set[str] = set()
    for name in names:
        run = run_of(job(name, SEEDS[0], overrides(name, teacher, [])).overrides)
        student, _ = build_network(run.cfg.student, run.data, "student", run.teacher.network)
        found |= set(run_objective(run, student, run.teacher.network).needs_teacher)
    return sorted(found)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", metavar="STRATEGY")
    parser.add_argument("--teacher", type=Path, metavar="RUN_DIR", help="a run with a finished teacher")
    given = parser.parse_args()

    from kd_lightning.config.catalog import strategies
    from kd_lightning.config.instantiate import conf_dir
    from kd_lightning.evaluation.profiling import environment

    known = [s.name for s in strategies(conf_dir() / "distillation") if "text" in s.models]
    if unknown := set(given.strategies) - set(known):
        sys.exit(
            f"compare_strategies: no text strategy is called {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    names = given.strategies or known
    started = time.monotonic()
    atexit.register(_add_minutes, started)
    teacher = str(given.teacher or RUNS / "teacher")
    if not given.teacher:
        train_run(["experiment=quickstart", "stages=[teacher]", f"run_dir={teacher}"], quiet=False)
    features = needed(known, teacher)
    print(f"the teacher outputs {len(features)} features besides logits: {', '.join(features)}", flush=True)
    jobs = {name: [job(name, seed, overrides(name, teacher, features)) for seed in SEEDS] for name in names}
    store_outputs(jobs[names[0]][0].overrides)

    train_all([jobs[name][number] for number in range(len(SEEDS)) for name in names])
    if given.strategies:  # a part is no comparison of all: it reads no test split and is not recorded
        for name in names:
            print(name, json.dumps(spread([one.validation("distill") for one in jobs[name]])))
        return
    found = [_row(name, jobs[name]) for name in names]
    found.sort(key=lambda row: -row["validation"]["mean"])
    content = {
        "student": STUDENT, "budget": BUDGET, "seeds": len(SEEDS),
        "teacher": {split: teacher_scores(jobs[names[0]][0], split)["accuracy"] for split in ("validation", "test")},
        "command": " ".join(["python", *sys.argv]), "minutes": _minutes(started),
        "environment": environment(), "strategies": found,
    }  # fmt: skip
    (ROOT / "results" / "strategies.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    picture(content)
    print("wrote results/strategies.json and results/strategies.png; now run scripts/update_readme.py")


def _row(name: str, jobs: list[Job]) -> dict[str, Any]:
    return {
        "name": name,
        "validation": spread([job.validation("distill") for job in jobs]),
        "test": spread([test_scores(job, "distill")["accuracy"] for job in jobs]),
        "seconds": spread([job.record("distill")["seconds"] for job in jobs]),
    }


def _minutes(started: float) -> dict[str, float]:
    """Return the minutes this call took, and those of earlier ones whose finished trainings it reuses.

    `cpu` are those of both processes together: what is left of the measure where other work shares the machine.
    """
    file = RUNS / "minutes.json"
    before = json.loads(file.read_text()) if file.is_file() else {"wall": 0.0, "cpu": 0.0}
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = {"wall": time.monotonic() - started, "cpu": sum(one.ru_utime + one.ru_stime for one in used)}
    return {name: before[name] + value / 60 for name, value in seconds.items()}


def _add_minutes(started: float) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "minutes.json").write_text(json.dumps(_minutes(started)))


def picture(content: dict[str, Any]) -> None:
    """Draw each strategy's test accuracy, the best first, with a bar for one standard deviation over the seeds."""
    rows = sorted(content["strategies"], key=lambda row: -row["test"]["mean"])
    base = next(row for row in rows if row["name"] == "labels_only")["test"]["mean"]
    figure = new_figure(8, 1.2 + 0.22 * len(rows))
    axes = figure.add_subplot()
    roles = ["baseline" if row["name"] == "labels_only" else "distilled" for row in rows]
    some = zip(rows, roles, strict=True)
    dots(
        axes,
        [Dot(row["name"], *_percents(row["test"]), COLOURS[role], MARKERS[role]) for row, role in some],
        "{:.1f}".format,
    )
    axes.axvline(100 * base, color=COLOURS["baseline"], linewidth=1, linestyle="--", zorder=0)
    means = [100 * row["test"]["mean"] for row in rows]
    axes.set_xlim(min(means) - 1, max(means) + 1)  # whatever the bars
    axes.set_xlabel(f"test accuracy, % (mean and standard deviation of {content['seeds']} seeds); dashed: labels only")
    axes.set_title("One student, one budget, every strategy", fontsize=TITLE)
    axes.tick_params(axis="y", labelsize=SMALL)
    figure.savefig(ROOT / "results" / "strategies.png", dpi=150)


def _percents(score: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    mean, deviation = 100 * score["mean"], 100 * score["std"]
    return mean, (mean - deviation, mean + deviation)


if __name__ == "__main__":
    without_traceback(main)
