"""The last stage: read the test split once, measure size and speed, and write the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_lightning.evaluation import profiling
from kd_lightning.evaluation.report import (
    PAGE,
    DataSummary,
    ModelResult,
    OutputsTime,
    build_report,
    load_report,
    print_table,
    read_curves,
    role,
    write_report,
)
from kd_lightning.pipeline.artefacts import publish
from kd_lightning.pipeline.details import described
from kd_lightning.pipeline.prepare import new_networks
from kd_lightning.pipeline.run_records import mark_reported
from kd_lightning.pipeline.speeds import TEACHER, Speed, measured
from kd_lightning.pipeline.stages import SHORT, plan
from kd_lightning.pipeline.teacher_check import findings_of
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.tasks.evaluation import Evaluation, Model, evaluate, evaluate_all, labels_of, of_network
from kd_lightning.teachers.clock import PREDICTING
from kd_lightning.training.run_folder import (
    FURTHER,
    best_stage,
    is_finished,
    load_run,
    read_stage,
    trainings_of,
)
from kd_lightning.types import Batch, ModelOutput, SparseLogits

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run
    from kd_lightning.pipeline.teacher_loading import LoadedTeacher
    from kd_lightning.tasks.details import Details
    from kd_lightning.teachers import Teacher

TITLES: dict[str, tuple[str, str]] = {
    "baseline": ("baseline", "student from labels"),
    "baseline_initialised": ("baseline_initialised", "student from labels, same start"),
    "distill": ("distilled", "distilled student"),
    "finetune": ("finetuned", "distilled, then fine-tuned"),
}
UNTRAINED = "untrained"
Evaluated = Mapping[str, Mapping[str, Evaluation]]
"""By split, and by a stage's folder, `TEACHER` or `UNTRAINED`."""
_PICTURES = re.compile(r"!\[[^\n]*\]\((\w+\.png)\)")
"""Of a report.md."""


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
        publish(run, report)
    mark_reported(run.folder, trainings)
    print_table(report, run.console)
    say(run.console, f"report: {run.folder / 'report.md'}, as one page: {run.folder / PAGE}")
    return report


def _known_report(run: Run, trainings: str) -> dict[str, Any] | None:
    """Return the report of these trainings, if it is intact; missing pictures are drawn again."""
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
    if not all((run.folder / name).is_file() for name in (*shown, PAGE)):
        write_report(report, run.folder)
    return report


def _finished(run: Run) -> dict[str, list[Path]]:
    """Return the finished stage folders by stage: assistants' and students', one per seed."""
    names = [f"assistant_{number}" for number in range(1, len(run.cfg.assistants) + 1)]
    found = {name: [folder] for name in names if is_finished(folder := run.folder / name)}
    for stage in TITLES:
        folders = [_longest_or_best(run.folder / f"seed_{seed}" / stage) for seed in run.seeds]
        if all(map(is_finished, folders)):
            found[stage] = folders
    if "teacher" in run.cfg.stages:
        teachers = run.teacher.members or [run.teacher]
        found["teacher"] = [folder for teacher in teachers for folder in _trainings(teacher)]
    return {stage: folders for stage, folders in found.items() if folders}


def _trainings(teacher: LoadedTeacher) -> list[Path]:
    """Return the folders of a teacher's trainings; none where it was not trained in a run."""
    if teacher.folder is None:
        return []
    return trainings_of(teacher.folder.parent if teacher.folder.name.startswith(FURTHER) else teacher.folder)


def _longest_or_best(folder: Path) -> Path:
    """Return a stage's folder, or that of its shorter training where that is better on validation."""
    short = folder.with_name(folder.name + SHORT)
    return best_stage([folder, short]) if is_finished(folder) and is_finished(short) else folder


def _make(run: Run, folders: dict[str, list[Path]], command: str, trainings: str) -> dict[str, Any]:
    data, cfg = run.data, run.cfg
    students = {stage: found for stage, found in folders.items() if stage != "teacher"}
    networks = {folder: load_run(folder).network for found in students.values() for folder in found}
    before = PREDICTING.seconds - _stored_seconds(run, 0)
    untrained = _untrained(run)
    if run.task.generates:
        say(run.console, f"report  networks are scored on {data.sizes['test']:,} blocks of the test split")
    watched = {str(found[0]): run.task.details() for found in students.values()}
    if run.compares:
        watched[TEACHER] = run.task.details()
    evaluated = _evaluated(run, {str(one): network for one, network in networks.items()} | untrained, watched)
    names = {TEACHER: TEACHER, **{str(found[0]): _name(stage) for stage, found in students.items()}}
    first = {stage: networks[found[0]] for stage, found in students.items()}
    timed, shown = measured(run, first)
    results = [
        _student(run, stage, {folder: networks[folder] for folder in found}, evaluated, timed.get(stage, Speed()))
        for stage, found in students.items()
    ]
    records = {stage: [read_stage(folder) for folder in found] for stage, found in folders.items()}
    if run.compares:
        live = PREDICTING.seconds - _stored_seconds(run, 0) - before
        results.insert(0, _teacher(run, evaluated, timed.get(TEACHER, Speed())))
        results = [_with_outputs(run, result, records, live) for result in results]
    for name in untrained:
        test, validation = (evaluated[split][name] for split in ("test", "validation"))
        results.append(ModelResult(name, "student, untrained", [test.scores], [validation.scores], units=[test.units]))
    return build_report(
        results,
        run=str(run.folder),
        task=f"{type(data).__name__}: {data.title}",
        seeds=run.seeds,
        command=command,
        environment=profiling.environment(),
        settings={
            "temperature": cfg.temperature, "alpha": cfg.alpha, "balance": cfg.balance,
            "steps": run.steps, "baseline_steps": _steps(records) or "none", "budget": cfg.budget,
            "batch_size": data.batch_size, "learning_rate": cfg.optimizer.get("lr"),
            "precision": cfg.trainer["precision"], "trainings": trainings, **_time(run),
            "teacher_precision": cfg.teacher.precision if cfg.teacher.url is None else "its server's",
        },
        data=DataSummary(
            name=type(data).__name__,
            splits=data.sizes,
            chance_score=run.task.chance_score(labels_of(run.task, data.test_dataloader())),
            class_names=data.class_names,
            fingerprint=data.fingerprint,
            monitor=run.task.monitor,
            specs=run.task.specs,
            calibration=run.task.calibration,
            unit=run.task.unit,
            learns_from=run.task.learns_from,
        ),
        stages_seconds={stage: sum(record["seconds"] for record in found) for stage, found in records.items()},
        notes=[*_of_left_out(run), *_of_served(run, evaluated), *_notes(run, records.get("distill", []))],
        samples=[{**one, "models": {_name(stage): text for stage, text in one["models"].items()}} for one in shown],
        details=described(run, {names[name]: parts for name, parts in watched.items()}),
    )  # fmt: skip


def _notes(run: Run, distilled: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was found of the teachers before students were trained."""
    own = [part for part in run.parts.values() if part.cfg.teacher.checkpoint is None]
    folders = [folder for part in own for folder in part.teacher_folders]
    lines = [f"{folder.relative_to(run.folder)}: {line}." for folder in folders for line in findings_of(folder)]
    temperature = next((one["teacher_temperature"] for one in distilled if "teacher_temperature" in one), None)
    if temperature is not None and run.cfg.teacher.calibrate == "auto":
        lines.append(
            f"The teacher's probabilities were badly calibrated: its logits are divided by {temperature:.3f}, which "
            "fits them to the validation split (teacher.calibrate=auto)."
        )
    return lines


def _time(run: Run) -> dict[str, float]:
    """Return the seconds that the run was expected to take, and has taken, if it was estimated."""
    return {} if run.clock is None else {"estimated_seconds": run.clock.total, "seconds": run.clock.passed}


def _steps(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[int]]:
    """Return how long the baselines were trained that are reported, seed by seed."""
    return {stage: [one["steps"] for one in found] for stage, found in records.items() if stage.startswith("baseline")}


def _of_left_out(run: Run) -> list[str]:
    """Return why a teacher is not among the models, and its scores if it only reads other tokens."""
    if not run.has_teacher or run.compares:
        return []
    if run.has_fresh_head:
        line = "The teacher's head is new and untrained: its scores, and agreement with it, are left out."
    else:
        data = run.data.select(tokens="teacher")
        found = evaluate(data.task, run.predicting_teacher.to(run.device), data.test_dataloader(), run.device).scores
        specs = data.task.specs
        compared = ", ".join(f"{specs[name].title} {value:.3f}" for name, value in found.items() if specs[name].across)
        line = f"The teacher has tokens of its own. Of its test scores these can be compared: {compared}."
    say(run.console, line)
    return [line]


def _of_served(run: Run, evaluated: Evaluated) -> list[str]:
    """Return what is known of a served teacher, and why no more is."""
    teacher = run.cfg.teacher
    if teacher.url is None or not run.compares:
        return []
    line = (
        f"The teacher, {teacher.model}, is served: students are compared with its {teacher.cache_top_k} likeliest "
        "tokens and all others as one."
    )
    unknown = math.isnan(evaluated["test"][TEACHER].scores[run.task.monitor])
    why = (
        " Its own loss is not known: the server gives no probability of some of the texts' tokens, which are not among "
        "its likeliest."
    )
    return [line + why * unknown]


def _untrained(run: Run) -> dict[str, nn.Module]:
    """Return a generating task's student as it was before the first seed's training, under its name.

    Layers that are cut out of a language model predict worse than random ones, which its report says.
    """
    stages = [stage for kind in ("distill", "baseline") for stage in plan(run) if stage.kind == kind]
    with torch.random.fork_rng(devices=[]):
        return {UNTRAINED: new_networks(run, stages[0])[0]} if stages and run.task.generates else {}


def _evaluated(run: Run, students: Mapping[str, nn.Module], watched: Mapping[str, Mapping[str, Details]]) -> Evaluated:
    """Score all networks of the run together, so that the teacher predicts each batch once.

    Args:
        run: The run.
        students: By name.
        watched: What is shown of some of them on the test split.
    """
    models: dict[str, Model] = {name: of_network(network, run.device) for name, network in students.items()}
    data, reference = run.data.select(tokens="both" if run.compares else "student"), None
    if run.compares:
        teacher, reference = run.predicting_teacher, TEACHER
        teacher.to(run.device)
        url, count = run.cfg.teacher.url, run.cfg.teacher.cache_top_k
        models[TEACHER] = teacher if url is None or count is None else _served(teacher, count)
    found = {
        "validation": evaluate_all(run.task, models, data.val_dataloader(), run.device, reference),
        "test": evaluate_all(run.task, models, data.test_dataloader(), run.device, reference, watched),
    }
    if reference is not None:
        teacher.flush()
    return found


def _served(teacher: Teacher, count: int) -> Model:
    """Return a served teacher by its likeliest tokens, also where the cache spread the tail over others."""

    def model(batch: Batch) -> ModelOutput:
        output = teacher(batch)
        sparse = SparseLogits.of(output.logits, count) if output.sparse is None else output.sparse
        return ModelOutput(sparse.values[..., :0], sparse=sparse)

    return model


def _teacher(run: Run, evaluated: Evaluated, speed: Speed) -> ModelResult:
    teachers, task, served = run.teacher.members or [run.teacher], run.task, run.cfg.teacher.url is not None
    folders = [teacher.folder for teacher in teachers if teacher.folder is not None]
    seconds = [read_stage(folder)["seconds"] for teacher in teachers for folder in _trainings(teacher)]
    test = evaluated["test"][TEACHER]
    return ModelResult(
        name="teacher",
        title="teacher, served" if served else f"{len(teachers)} teachers" if len(teachers) > 1 else "teacher",
        test=[test.scores],
        validation=[evaluated["validation"][TEACHER].scores],
        size=None if served else profiling.size(run.teacher.network),
        **speed._asdict(),
        training_seconds=[sum(seconds)] if seconds else [],
        curves=[read_curves(folder, run.seeds[0], task.monitor) for folder in folders] if len(teachers) == 1 else [],
        units=[test.units] if test.units else [],
    )


def _stored_seconds(run: Run, number: int, own: bool = False) -> float:
    """Return how long teacher 0, 1, ... predicted what its caches hold, or only for this run."""
    if number >= len(run.providers) or "distill" not in run.cfg.stages or not run.has_teacher:
        return 0.0  # nobody has opened a cache
    return sum(cache.manifest.seconds(cache.run if own else None) for cache in run.providers[number].caches())


def _with_outputs(
    run: Run, result: ModelResult, records: Mapping[str, list[dict[str, Any]]], live: float
) -> ModelResult:
    """Return a result with the time that its predictions took, if it is a teacher's or an assistant's.

    Args:
        run: The run.
        result: The result.
        records: Of the trainings, by stage.
        live: What the teacher took for this report and stored nowhere.
    """
    if role(result.name) not in ("teacher", "assistant"):
        return result
    number = int(result.name.removeprefix("assistant_")) if role(result.name) == "assistant" else 0
    taught = records.get("distill" if number == len(run.cfg.assistants) else f"assistant_{number + 1}", [])
    training = sum(record.get("teacher_seconds", 0.0) for record in taught)
    stored, kept = _stored_seconds(run, number), bool(taught and run.providers[number].caches())
    total = stored + (0.0 if kept else training) + (live if number == 0 else 0.0)
    reused = stored - _stored_seconds(run, number, own=True)
    return replace(result, outputs_seconds=OutputsTime(total, reused, training))


def _name(stage: str) -> str:
    """Return what a stage's model is called in a report."""
    return TITLES.get(stage, (stage, ""))[0]


def _student(
    run: Run, stage: str, networks: Mapping[Path, nn.Module], evaluated: Evaluated, speed: Speed
) -> ModelResult:
    folders = list(networks)
    name, title = _name(stage), TITLES.get(stage, ("", stage.replace("_", " ")))[1]
    test = [evaluated["test"][str(folder)] for folder in folders]
    return ModelResult(
        name=name,
        title=title.replace("labels", run.task.learns_from),
        test=[one.scores for one in test],
        validation=[evaluated["validation"][str(folder)].scores for folder in folders],
        size=profiling.size(networks[folders[-1]], folders[-1] / "model.safetensors"),
        **speed._asdict(),
        training_seconds=[read_stage(folder)["seconds"] for folder in folders],
        curves=[read_curves(folder, seed, run.task.monitor) for seed, folder in zip(run.seeds, folders, strict=False)],
        units=[one.units for one in test if one.units],
    )
