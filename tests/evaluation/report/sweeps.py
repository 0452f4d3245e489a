"""Made-up sweep folders: what `kd-train -m` leaves in them, without the training."""

from __future__ import annotations

import json
import math
import random
import shlex
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from kd_lightning.config.resolvers import folder_name
from kd_lightning.evaluation.profiling import Latency, Size
from kd_lightning.runtime.seals import write_sealed
from kd_lightning.training.run_folder import write_config
from tests.evaluation.report.examples import model, report_of


def begin(sweep: Path, sweeper: str = "BasicSweeper", **values: Any) -> Path:
    """A point that has begun, by its overrides (`__` for a dot)."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    folder = sweep / folder_name(",".join(overrides))
    folder.mkdir(parents=True)
    record = {
        "overrides": ["data=reviews", *overrides],
        "command": shlex.join(["kd-train", "data=reviews", *overrides]),
        "sweeper": sweeper,
    }
    write_sealed(folder / "overrides.json", record)
    return folder


def fail(folder: Path, error: str) -> None:
    record = json.loads((folder / "overrides.json").read_text())
    record |= {"error": error, "type": "ConfigError", "traceback": f"Traceback of\n{error}"}
    write_sealed(folder / "failure.json", record)


def finish(
    folder: Path, score: float, baseline: float | None = 0.75, size: int = 4_000_000, seeds: int = 1,
    same_start: float | None = None, stages: list[str] | None = None,
) -> None:  # fmt: skip
    """Give it a result: a validation score, and 0.1 less on test, or so."""
    scores = [score + 0.01 * (i - (seeds - 1) / 2) for i in range(seeds)]
    changes: dict[str, Any] = {
        "size": Size(size, size // 10, 4 * size),
        "latency": Latency(size / 4e6, 2.0, 9, 1, "cpu"),
    }
    results = [model("teacher", [0.85]), model("distilled", [s - 0.01 for s in scores], **changes)]
    if baseline is not None:
        results.append(model("baseline", [baseline - 0.01] * seeds, **changes))
    if same_start is not None:
        results.append(model("baseline_initialised", [same_start - 0.01] * seeds, **changes))
    results[1].test[:] = [{**entry, "accuracy": s - 0.1234} for entry, s in zip(results[1].test, scores, strict=True)]
    report = report_of(results, seeds=list(range(seeds)))
    write_sealed(folder / "report.json", report)
    values = dict(o.split("=", 1) for o in json.loads((folder / "overrides.json").read_text())["overrides"])
    config = {
        "stages": stages or ["teacher", "baseline", "distill"],
        "seed": int(values.get("seed", 0)),
        "alpha": 0.9,
        "temperature": 2,
    }
    write_config(folder, yaml.safe_dump(config))
    write_sealed(folder / "score.json", {"score": score, "metric": "accuracy"})


def grid(sweep: Path) -> Path:
    """2 x 2 points of 2 seeds: the best pair lacks a seed that failed, one point is not finished."""
    scores = {(1, 0.1): 0.76, (1, 0.9): 0.80, (4, 0.1): 0.74, (4, 0.9): 0.82}
    for (temperature, alpha), seed in product(scores, (0, 1)):
        folder = begin(sweep, temperature=temperature, alpha=alpha, seed=seed)
        if (temperature, alpha, seed) == (4, 0.9, 1):
            fail(folder, "the loss is nan & <b>bold</b>")
        elif (temperature, alpha, seed) != (4, 0.1, 1):
            finish(folder, scores[temperature, alpha] + 0.01 * seed)
    (sweep / "shared" / "teacher-0123").mkdir(parents=True)
    return sweep


def searched(sweep: Path, trials: int = 12) -> Path:
    """Points as Optuna proposes them: three floats, no value twice."""
    draw = random.Random(0)
    for _ in range(trials):
        temperature, alpha, rate = 10 ** draw.uniform(0, 1), draw.uniform(0, 1), 10 ** draw.uniform(-4, -2)
        folder = begin(sweep, "OptunaSweeper", temperature=temperature, alpha=alpha, optimizer__lr=rate)
        finish(folder, 0.8 - (math.log10(rate) + 3) ** 2 / 30 - abs(temperature - 3) / 100)
    return sweep


def students(sweep: Path) -> Path:
    """Two students of different size under two strategies."""
    for (student, size), strategy in product(
        {"bilstm": 4_000_000, "<i>tiny</i>": 400_000}.items(), ("soft_target", "dkd")
    ):
        folder = begin(sweep, **{"model@student": student, "distillation": strategy})
        finish(folder, 0.75 + size / 1e8 + (strategy == "dkd") / 100, size=size, seeds=3)
    return sweep
