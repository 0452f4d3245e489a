"""Made-up results that look like a run's."""

from __future__ import annotations

import io
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kd_lightning.evaluation.profiling import Latency, Size, Throughput
from kd_lightning.evaluation.report import Curve, DataSummary, ModelResult, build_report, print_table
from kd_lightning.tasks import Classification

TITLES = {
    "teacher": "teacher",
    "baseline": "student from labels",
    "baseline_initialised": "student from labels, teacher's start",
    "distilled": "distilled student",
    "finetuned": "distilled, then fine-tuned",
}


def curve(seed: int, top: float) -> Curve:
    jitter = random.Random(seed)
    steps = range(100, 1100, 100)
    score = {s: top - 0.2 * math.exp(-s / 250) + jitter.uniform(-0.005, 0.005) for s in steps}
    return Curve(seed=seed, score=score, loss={s: 1 / s for s in range(10, 1000, 50)})


def scores(accuracy: float, teacher: bool = False) -> dict[str, float]:
    own = {"accuracy": accuracy, "macro_f1": accuracy - 0.003, "ece": 0.04, "cross_entropy": 0.5}
    return own if teacher else {**own, "agreement": 0.9, "kl_to_teacher": 0.123}


def model(name: str, accuracies: list[float], **changes: Any) -> ModelResult:
    is_teacher = name == "teacher"
    result = ModelResult(
        name=name,
        title=TITLES[name],
        test=[scores(a, is_teacher) for a in accuracies],
        validation=[scores(a + 0.01, is_teacher) for a in accuracies],
        size=Size(22_713_216, 10_750_000, 90_852_864) if is_teacher else Size(4_100_000, 200_000, 16_400_512),
        latency=Latency(12.3, 15.7, 200, 2, "cpu") if is_teacher else Latency(1.04, 1.52, 200, 2, "cpu"),
        throughput=Throughput(410.0 if is_teacher else 5321.0, 128, 2, "cpu"),
        training_seconds=[50.0 + i for i in range(len(accuracies))],
        curves=[curve(seed, a + 0.01) for seed, a in enumerate(accuracies)] if not is_teacher else [],
    )
    return replace(result, **changes)


def models(
    teacher: float = 0.846, baseline: tuple[float, ...] = (0.759,), distilled: tuple[float, ...] = (0.824,)
) -> list[ModelResult]:
    return [model("teacher", [teacher]), model("baseline", list(baseline)), model("distilled", list(distilled))]


def report_of(results: list[ModelResult], n_test: int = 2000, chance: float = 0.5, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "run": "runs/quickstart",
        "task": "reviews",
        "seeds": list(range(max(len(r.test) for r in results))),
        "command": "kd-train experiment=quickstart",
        "environment": {"python": "3.11.2", "versions": {"torch": "2.13.0"}, "git_commit": None, "cuda_devices": []},
        "settings": {"temperature": 2.0, "alpha": 0.9, "folder": Path("runs")},
        "data": DataSummary(
            "reviews",
            {"train": 8000, "validation": 1000, "test": n_test},
            chance,
            "accuracy",
            Classification(2).specs,
            ["neg", "pos"],
            calibration="ece",
        ),
        "stages_seconds": {"teacher": 61.2, "baseline": 50.0, "distill": 88.0},
    }
    return build_report(results, **{**arguments, **changes})


FIVE = {"baseline": (0.759, 0.752, 0.764, 0.757, 0.761), "distilled": (0.824, 0.819, 0.828, 0.822, 0.826)}


def printed(report: dict[str, Any], width: int | None = 100, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_table(report, console)
    return console.file.getvalue()
