"""The last stage: read the test split once, measure size and speed, and write the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd_lightning.evaluation import profiling
from kd_lightning.evaluation.report import (
    Curve,
    DataSummary,
    ModelResult,
    build_report,
    load_report,
    print_table,
    read_curve,
    write_report,
)
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.tasks.predictions import Answers, answers, network_answers
from kd_lightning.training.run_folder import is_finished, load_run, read_stage
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run

TITLES: dict[str, tuple[str, str]] = {
    "baseline": ("baseline", "student from labels"),
    "baseline_initialised": ("baseline_initialised", "student from labels, initialised"),
    "distill": ("distilled", "distilled student"),
    "finetune": ("finetuned", "distilled, then fine-tuned"),
}
LATENCY_EXAMPLES = 100
_PICTURES = re.compile(r"!\[[^\n]*\]\((\w+\.png)\)")
"""Of a report.md."""
Speed = tuple[profiling.Latency | None, profiling.Throughput | None]


def compare(run: Run, command: str) -> dict[str, Any]:
    """Write `report.json`, `report.md` and the pictures, print the table, and return the report.

    A report of these very trainings is printed again, not made again: the test split is read once.
    """
    folders = _finished(run)
    records = [read_stage(folder) for found in folders.values() for folder in found]
    trainings = digest(sorted(record["fingerprint"] + record["files"]["model.safetensors"] for record in records))
    report = _known_report(run, trainings)
    if report is None:
        report = _make(run, folders, command, trainings)
        write_report(report, run.folder)
    print_table(report, run.console)
    say(run.console, f"report: {run.folder / 'report.md'}")
    return report


def _known_report(run: Run, trainings: str) -> dict[str, Any] | None:
    """Return the report of these trainings, if it is there and whole; what it shows is drawn again where it is gone."""
    if not (run.folder / "report.json").is_file():
        return None
    try:
        report = load_report(run.folder)
    except DataError as error:
        say(run.console, f"{error}; it is made anew")
        return None
    if report["settings"].get("trainings") != trainings:
        return None
    text = run.folder / "report.md"
    shown = _PICTURES.findall(text.read_text(encoding="utf-8")) if text.is_file() else [text.name]
    if not all((run.folder / name).is_file() for name in shown):
        write_report(report, run.folder)
    return report


def _finished(run: Run) -> dict[str, list[Path]]:
    """Return the finished stage folders by stage: the assistants', and the students' of this run, one folder a seed."""
    names = [f"assistant_{number}" for number in range(1, len(run.cfg.assistants) + 1)]
    found = {name: [folder] for name in names if is_finished(folder := run.folder / name)}
    for stage in TITLES:
        folders = [run.folder / f"seed_{seed}" / stage for seed in run.seeds]
        if all(map(is_finished, folders)):
            found[stage] = folders
    if "teacher" in run.cfg.stages:
        teachers = run.teacher.members or [run.teacher]
        found["teacher"] = [teacher.folder for teacher in teachers if teacher.folder is not None]
    return {stage: folders for stage, folders in found.items() if folders}


def _make(run: Run, folders: dict[str, list[Path]], command: str, trainings: str) -> dict[str, Any]:
    data, cfg = run.data, run.cfg
    teacher = _teacher_answers(run) if run.has_teacher else None
    speeds = _speeds(run, folders)
    results = [
        _student(run, stage, found, teacher, speeds[stage]) for stage, found in folders.items() if stage != "teacher"
    ]
    if teacher is not None:
        results.insert(0, _teacher(run, teacher, speeds.get("teacher", (None, None))))
    labels = torch.cat([batch["labels"] for batch in data.test_dataloader()])
    records = {stage: [read_stage(folder) for folder in found] for stage, found in folders.items()}
    return build_report(
        results,
        run=str(run.folder),
        task=f"{type(data).__name__}: {data.title}",
        seeds=run.seeds,
        command=command,
        environment=profiling.environment(),
        settings={
            "temperature": cfg.temperature, "alpha": cfg.alpha, "balance": cfg.balance,
            "steps": run.steps, "batch_size": data.batch_size, "learning_rate": cfg.optimizer.get("lr"),
            "precision": cfg.trainer["precision"], "teacher_precision": cfg.teacher.precision,
            "trainings": trainings,
        },
        data=DataSummary(
            name=type(data).__name__,
            splits=data.sizes,
            majority_accuracy=run.task.guess(labels),
            class_names=data.class_names,
            fingerprint=data.fingerprint,
            score=run.task.main,
        ),
        stages_seconds={stage: sum(record["seconds"] for record in found) for stage, found in records.items()},
    )  # fmt: skip


def _teacher_answers(run: Run) -> dict[str, Answers]:
    """Ask the teacher about validation and test, or look its answers up."""
    data, teacher = run.data.select(tokens="both"), run.predicting_teacher
    teacher.to(run.device)
    loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
    said = {split: answers(teacher, loader, run.device) for split, loader in loaders.items()}
    teacher.flush()
    return said


def _teacher(run: Run, said: dict[str, Answers], speed: Speed) -> ModelResult:
    teachers, task = run.teacher.members or [run.teacher], run.task
    folders = [teacher.folder for teacher in teachers if teacher.folder is not None]
    return ModelResult(
        name="teacher",
        title=f"{len(teachers)} teachers" if len(teachers) > 1 else "teacher",
        test=[task.evaluate(said["test"], said["test"].logits)],
        validation=[task.evaluate(said["validation"], said["validation"].logits)],
        size=profiling.size(run.teacher.network),
        latency=speed[0],
        throughput=speed[1],
        training_seconds=[sum(read_stage(folder)["seconds"] for folder in folders)] if folders else [],
        curves=[_curve(folder, run.seeds[0], task.main) for folder in folders] if len(teachers) == 1 else [],
        correct=list(filter(None, [task.correct(said["test"])])),
    )


def _student(
    run: Run, stage: str, folders: Sequence[Path], teacher: dict[str, Answers] | None, speed: Speed
) -> ModelResult:
    data = run.data.select(tokens="student")
    scores: dict[str, list[dict[str, float]]] = {"validation": [], "test": []}
    correct: list[list[bool]] = []
    for folder in folders:
        network = load_run(folder).network
        for split, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
            said = network_answers(network, loader, run.device)
            scores[split].append(run.task.evaluate(said, teacher[split].logits if teacher else None))
        correct.append(run.task.correct(said))
    name, title = TITLES.get(stage, (stage, stage.replace("_", " ")))
    return ModelResult(
        name=name,
        title=title,
        test=scores["test"],
        validation=scores["validation"],
        size=profiling.size(network, folders[-1] / "model.safetensors"),
        latency=speed[0],
        throughput=speed[1],
        training_seconds=[read_stage(folder)["seconds"] for folder in folders],
        curves=[_curve(folder, seed, run.task.main) for seed, folder in zip(run.seeds, folders, strict=False)],
        correct=list(filter(None, correct)),
    )


def _curve(folder: Path, seed: int, score: str) -> Curve:
    """Read a stage's learning curve; a training that was resumed has one log an attempt, and the later one counts."""
    curve = Curve(seed, {}, {})
    for log in sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda log: int(log.parent.name.split("_")[1])):
        part = read_curve(log, seed, accuracy_key=f"val/{score}")
        curve.accuracy.update(part.accuracy)
        curve.loss.update(part.loss)
        for known, new in ((curve.loss_share, part.loss_share), (curve.gradient_share, part.gradient_share)):
            for term, values in new.items():
                known.setdefault(term, {}).update(values)
    return curve


def _speeds(run: Run, folders: dict[str, list[Path]]) -> dict[str, Speed]:
    """Time the first seed's networks side by side, each on its own inputs of the same validation examples."""
    networks = {stage: load_run(found[0]).network for stage, found in folders.items() if stage != "teacher"}
    if run.has_teacher and not run.providers[0].reads_other_tokens:  # no batch holds what each of its members reads
        networks["teacher"] = run.teacher.network.cpu()
    batches = {
        name: list(run.data.select(tokens="teacher" if name == "teacher" else "student").val_dataloader())
        for name in networks
    }
    singles = {
        name: _spread(
            sorted(profiling.single_examples(own), key=lambda example: int(example["index"])), LATENCY_EXAMPLES
        )
        for name, own in batches.items()
    }
    latency = profiling.measure_latency(networks, singles)
    throughput = profiling.measure_throughput(networks, {name: _spread(own, 4) for name, own in batches.items()})
    return {name: (latency[name], throughput[name]) for name in networks}


def _spread(items: list[Batch], count: int) -> list[Batch]:
    """Return about so many items, evenly spread: batches come ordered by length."""
    return items[:: max(len(items) // count, 1)][:count]
