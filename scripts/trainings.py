"""Many trainings side by side, one thread each, for the scripts that measure what learning from a teacher is worth."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """One run of some stages with one seed.

    Attributes:
        name: What it is called on the screen.
        settings: Its configuration, as for `kd-train`.
        folder: Where its files go.
        seed: Of its student.
    """

    name: str
    settings: tuple[str, ...]
    folder: Path
    seed: int

    @property
    def overrides(self) -> list[str]:
        """The whole configuration."""
        return [*self.settings, f"seed={self.seed}", "seeds=1", "logger={}", f"run_dir={self.folder}"]

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.folder / f"seed_{self.seed}" / name

    def is_trained(self, stage: str = "distill") -> bool:
        """Return whether a stage is finished."""
        return (self.stage(stage) / "stage.json").is_file()

    def record(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage recorded."""
        record: dict[str, Any] = json.loads((self.stage(stage) / "stage.json").read_text(encoding="utf-8"))
        return record

    def validation(self, stage: str) -> float:
        """Return a finished stage's score on the validation split."""
        from kd_lightning.training.run_folder import validation_score

        return validation_score(self.record(stage))


def run_of(settings: Sequence[str], quiet: bool = True) -> Any:
    """Return the run of a configuration, of which nothing is trained yet."""
    from hydra import compose, initialize_config_dir
    from rich.console import Console

    from kd_lightning.config.instantiate import conf_dir
    from kd_lightning.pipeline.context import Run
    from kd_lightning.pipeline.resolvers import register_resolvers
    from kd_lightning.runtime import log_filters

    log_filters.quiet()
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", list(settings))
    return Run(cfg, Console(file=io.StringIO()) if quiet else None)


def train_run(settings: Sequence[str], quiet: bool = True) -> None:
    """Train the stages of a configuration."""
    from kd_lightning.pipeline import run

    run.train_all(run_of(settings, quiet))


def store_outputs(settings: Sequence[str]) -> None:
    """Have the teacher of a configuration predict every example, and store what it predicts."""
    from kd_lightning.pipeline.run import build_caches

    build_caches(run_of(settings, quiet=False))


def train(job: Job) -> None:
    """Run a job on one core; what is finished is not trained again."""
    import torch

    torch.set_num_threads(1)
    train_run(job.overrides)


def train_all(jobs: Sequence[Job]) -> None:
    """Run jobs side by side and say how each ended; those that a mistake stopped are told at the end, too."""
    from kd_lightning.runtime.errors import KDError

    started, failed = time.monotonic(), []
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(train, job): job for job in jobs}
        for done, future in enumerate(as_completed(waiting), 1):
            job = waiting[future]
            try:
                future.result()
            except KDError as error:
                failed.append(f"{job.name}: {error}")
                print(f"{done}/{len(jobs)}  {failed[-1]}", flush=True)
                continue
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            stages = sorted(file.parent.name for file in (job.folder / f"seed_{job.seed}").glob("*/stage.json"))
            scores = ", ".join(f"{stage} {job.validation(stage):.4f}" for stage in stages)
            minutes = (time.monotonic() - started) / 60
            print(f"{done}/{len(jobs)}  {job.name}: validation {scores}  ({minutes:.0f} min)", flush=True)
    if failed:
        sys.exit("\n".join([f"{len(failed)} of {len(jobs)} trainings failed:", *failed]))


def report_of(settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run `kd-train` in a process of its own, as a user does, and return its report; at most 6 hours."""
    command = [sys.executable, "-m", "kd_lightning.cli.train", *settings, f"run_dir={folder}"]
    print("$", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True, timeout=6 * 3600, env=os.environ | {"PYTHONPATH": str(ROOT)})
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def parsed(parser: argparse.ArgumentParser, known: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of a script that measures what is named, or all that is known, as `names`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(known))
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in known]:
        sys.exit(f"{Path(sys.argv[0]).stem}: there is no {unknown[0]!r}; there are {'; '.join(known)}")
    given.names = given.names or list(known)
    return given


def read_result(file: Path) -> dict[str, Any]:
    """Return what was measured so far."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def write_result(file: Path, row: dict[str, Any], *names: str) -> None:
    """Put a row under its names into what was measured so far."""
    document = place = read_result(file)
    for name in names[:-1]:
        place = place.setdefault(name, {})
    place[names[-1]] = row
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def written(score: dict[str, Any] | None, write: Callable[[float], str]) -> str:
    """Return a score of a report with its deviation over seeds; nothing where there is none."""
    from kd_lightning.evaluation.report.table import spread as mean_and_deviation

    return "" if score is None or score["mean"] is None else mean_and_deviation(score, write)


def percent(score: dict[str, Any] | None) -> str:
    """Return a score of a report in percent, with its deviation over seeds."""
    return written(score, lambda value: f"{100 * value:.1f}")


def without_traceback(main: Callable[[], None]) -> None:
    """Run a script; a user's mistake ends it in one line."""
    from kd_lightning.runtime.errors import KDError

    try:
        main()
    except KDError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def test_scores(job: Job, stage: str) -> dict[str, float]:
    """Read the test split: how the selected student of a stage scores."""
    from kd_lightning.tasks.evaluation import evaluate, of_network
    from kd_lightning.training.run_folder import load_run

    data = _data(job.settings)
    return evaluate(data.task, of_network(load_run(job.stage(stage)).network), data.test_dataloader()).scores


@cache
def _data(settings: tuple[str, ...]) -> Any:
    """Return the data as students read them; seeds have them in common."""
    nowhere = ROOT / "runs" / "nothing_is_written"  # whatever else is in the folder that the experiment names
    return run_of([*settings, "logger={}", f"run_dir={nowhere}"]).data.select(tokens="student")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "values": list(values)}


def gain(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return how much better one is than the other, seed by seed, and the standard error of that."""
    gains = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def closed(before: Sequence[float], after: Sequence[float], above: float) -> dict[str, Any]:
    """Return the distillation ratio (S_kd - S) / (T - S), seed by seed, as `spread` does."""
    return spread([(taught - alone) / (above - alone) for alone, taught in zip(before, after, strict=True)])


def teacher_scores(job: Job, split: Literal["validation", "test"] = "test") -> dict[str, float]:
    """Return how the teacher of a job scores on a split, in float32 as its students are.

    What it told them may be rounded to bfloat16, which other batches turn another way.
    """
    from kd_lightning.tasks.evaluation import evaluate

    run = run_of(job.overrides)
    for part in run.parts.values():  # its folder holds a training below the rounded outputs
        provider = run.provider_of(part)
        provider.serving = replace(provider.serving, precision="float32", cache="off")
    data = run.data.select(tokens="both")
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    return evaluate(data.task, run.predicting_teacher, loader).scores
