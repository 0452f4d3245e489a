"""Measures speed, size and accuracy of a run's teacher, its student and their exports, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.config.trust import trusts_all
from kd_lightning.export.exported import is_export, read_exported
from kd_lightning.export.source import find_student, role_of, run_data
from kd_lightning.runtime.borders import code, drawn, tell
from kd_lightning.runtime.errors import ConfigError, KDError

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.training.run_folder import TrainedModel
    from kd_lightning.types import Batch

SIZES = (1, 8, 32, 128)
"""Examples in a batch, of which throughput is measured."""

LATENCY_EXAMPLES = 200
THROUGHPUT_EXAMPLES = 512
MEMORY_SECONDS = 1800
"""Time limit of the process that loads a network and runs some batches to measure its memory."""


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: In the table.
        kind: `teacher`, `student` or the export's format.
        folder: Where it was loaded from.
        file: Its weights.
        model: The loaded model.
        role: Whose tokens it uses.
        run: The run that it was found in; None for an export.
    """

    name: str
    kind: str
    folder: Path
    file: Path
    model: TrainedModel
    role: Any
    run: Path | None = None


def benchmark(
    folders: Sequence[Path], *, threads: int = 1, seed: int | None = None, out: Path | None = None, command: str = ""
) -> tuple[dict[str, Any], Path]:
    """Measure the models of the folders, and write the result.

    Args:
        folders: Run folders (teacher and student) and export folders.
        threads: CPU threads of each.
        seed: Which seed's student; None: the best on validation.
        out: Where `benchmark.json`, `.md` and `.png` go: new, or empty. None: `benchmark` in the first run's folder.
        command: The command line stored in the files.

    Returns:
        The result, and the folder of its files.

    Raises:
        ConfigError: There is no run among the folders, they do not fit each other, or `out` is not empty.
        KDError: A folder is damaged, or does not load.
    """
    from kd_lightning.export.write import check_vacant

    if threads < 1:
        raise ConfigError(f"--threads {threads}: expected 1 or more")
    run = next((folder for folder in folders if not is_export(folder)), folders[0])
    out = out or run / "benchmark"
    check_vacant(out)
    subjects, stage = subjects_of(folders, threads, seed)
    result = document(measure(subjects, stage, threads), command, threads, str(run))
    write(result, out)
    return result, out


def subjects_of(folders: Sequence[Path], threads: int, seed: int | None = None) -> tuple[list[Subject], Path]:
    """Load what the folders hold.

    Args:
        folders: Run folders (teacher and student) and export folders.
        threads: CPU threads of each.
        seed: Which seed's student.

    Returns:
        The subjects, and the stage folder of the first run's student, whose data are used.

    Raises:
        ConfigError: There is no run among the folders, or one of them is neither run nor export.
    """
    runs = [folder for folder in folders if not is_export(folder)]
    if not runs:
        raise ConfigError("give a run folder too: exports are measured on its validation split")
    students = [find_student(run, seed) for run in runs]
    found: list[Subject] = []
    for run, stage in zip(runs, students, strict=True):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        teacher = _teacher_of(run)
        if teacher is None:
            tell(f"{run}: its teacher is in no run folder here and is not measured")
        elif teacher.resolve() not in [subject.folder.resolve() for subject in found]:  # runs may share one
            found.append(_trained(f"{prefix}teacher", "teacher", teacher, run))
        found.append(_trained(f"{prefix}student", "student", stage, run))
    found += [_exported(folder, threads, found) for folder in folders if is_export(folder)]
    return found, students[0]


def _teacher_of(run: Path) -> Path | None:
    """Return the stage folder of a run's teacher: its own, or the one that `teacher.checkpoint` names."""
    from kd_lightning.export.history import located
    from kd_lightning.training.run_folder import best_training, is_finished, read_config, teacher_stage

    if is_finished(run / "teacher"):
        return best_training(run / "teacher")
    given = None
    if (run / "config.yaml").is_file():
        given = (read_config(run).get("teacher") or {}).get("checkpoint")
    return teacher_stage(located(given, run)) if isinstance(given, str) else None


def _trained(name: str, kind: str, stage: Path, run: Path) -> Subject:
    from kd_lightning.training.run_folder import load_run

    return Subject(name, kind, stage, stage / "model.safetensors", load_run(stage), role_of(stage), run)


def _exported(folder: Path, threads: int, before: Sequence[Subject]) -> Subject:
    from kd_lightning.export.load import load_export

    exported = read_exported(folder)
    model = load_export(folder, threads)
    name = exported.title if folder.name == exported.title else f"{exported.title} ({folder.name})"
    role = next(subject.role for subject in before if subject.kind == "student")
    return Subject(name, exported.format, folder, folder / exported.model, model, role)


def measure(subjects: Sequence[Subject], stage: Path, threads: int) -> list[dict[str, Any]]:
    """Measure all subjects in turns on each example, so that a slow moment affects all of them.

    Args:
        subjects: The models, with different names.
        stage: The student's stage folder, whose run's data are used.
        threads: CPU threads.

    Returns:
        A row for each, as JSON can hold it.

    Raises:
        ConfigError: One of them has other classes or tokens than that run.
    """
    import torch

    from kd_lightning.evaluation.profiling import measure_latency, measure_throughput
    from kd_lightning.tasks.evaluation import Model, evaluate_all, of_network
    from kd_lightning.teachers import FrozenTeacher
    from kd_lightning.training.run_folder import teacher_precision

    torch.set_num_threads(threads)
    whole = run_data(stage)
    data = {role: whole.select(tokens=role) for role in {subject.role for subject in subjects}}
    task = next(iter(data.values())).task
    for subject in subjects:
        _check_fits(subject, whole, stage)
    networks = {subject.name: subject.model.network for subject in subjects}
    if len(networks) < len(subjects):
        raise ConfigError("two folders have the same name: rename one, so that the table's rows are unique")
    alone = {role: _singles(own) for role, own in data.items()}
    latency = measure_latency(networks, {subject.name: alone[subject.role] for subject in subjects}, threads=threads)
    throughput: dict[str, dict[int, float | None]] = {name: dict.fromkeys(SIZES) for name in networks}
    held_out = whole.sizes["validation"]
    for size in [size for size in SIZES if size <= held_out]:
        batches = {role: _batches(own, size) for role, own in data.items()}
        measured = measure_throughput(networks, {subject.name: batches[subject.role] for subject in subjects})
        for name, one in measured.items():
            throughput[name][size] = one.examples_per_second
    models: dict[str, Model] = {
        s.name: FrozenTeacher(s.model.network, teacher_precision(s.folder, s.run)) if s.role == "teacher"
        else of_network(s.model.network)
        for s in subjects
    }  # fmt: skip
    student = next(subject.name for subject in subjects if subject.kind == "student")
    read = whole.select(tokens="both" if "teacher" in data else "student")
    evaluated = evaluate_all(task, models, read.val_dataloader(), reference=student)
    largest = {role: _batches(own, SIZES[-1])[:2] for role, own in data.items()}
    rows = []
    for subject in subjects:
        scores = evaluated[subject.name].scores
        rows.append({
            "name": subject.name,
            "kind": subject.kind,
            "latency_ms": {"p50": latency[subject.name].p50, "p95": latency[subject.name].p95},
            "throughput": {str(size): value for size, value in throughput[subject.name].items()},
            "peak_memory_bytes": peak_memory(subject, largest[subject.role], threads),
            "file_bytes": subject.file.stat().st_size,
            "score": {"title": task.specs[task.monitor].title, "value": scores[task.monitor]},
            "agreement_with_student": scores.get("agreement"),
        })  # fmt: skip
    return rows


def _check_fits(subject: Subject, data: IndexedData, stage: Path) -> None:
    """Refuse a model with other classes or tokens than the run."""
    theirs, ours = subject.model.tokenizer, data.tokenizer_of(subject.role)
    if subject.model.class_names != data.class_names:
        raise ConfigError(f"{subject.folder} has the classes {subject.model.class_names}, {stage} {data.class_names}")
    if theirs is not None and (ours is None or theirs.get_vocab() != ours.get_vocab()):
        raise ConfigError(f"{subject.folder} uses other tokens than {stage}: measure it with its own run")


def _singles(data: IndexedData) -> list[Batch]:
    """Return single validation examples, short and long, the same ones for every tokenizer."""
    from kd_lightning.evaluation.profiling import single_examples

    singles = sorted(single_examples(data.val_dataloader()), key=lambda batch: int(batch["index"]))
    return singles[:: max(1, len(singles) // LATENCY_EXAMPLES)][:LATENCY_EXAMPLES]


def _batches(data: IndexedData, size: int) -> list[Batch]:
    """Return validation batches of this size, spread over short and long ones."""
    batches = list(data.with_batches(eval_batch_size=size).val_dataloader())
    whole = [batch for batch in batches if len(batch["index"]) == size] or batches
    wanted = max(1, THROUGHPUT_EXAMPLES // size)
    return whole[:: max(1, len(whole) // wanted)][:wanted]


def peak_memory(subject: Subject, batches: Sequence[Batch], threads: int) -> int:
    """Return the peak resident size, in bytes, of a process that loads a subject and runs some batches."""
    import numpy as np

    from kd_lightning.runtime.files import naming

    kind = subject.kind if subject.kind in ("onnx", "pt2") else "folder"
    path = subject.file if kind != "folder" else subject.folder
    entries = {f"{i}/{name}": value.numpy() for i, batch in enumerate(batches) for name, value in batch.items()}
    with tempfile.TemporaryDirectory() as folder:
        with naming(Path(folder)):
            np.savez(Path(folder) / "batches.npz", **entries)  # type: ignore[arg-type]
        command = [sys.executable, "-P", "-m", "kd_lightning.export.peak"]
        command += [kind, str(path), f"{folder}/batches.npz", str(threads), str(trusts_all())]
        own = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=own, check=False, timeout=MEMORY_SECONDS)
        except subprocess.TimeoutExpired:
            limit = f"{MEMORY_SECONDS // 60} minutes"
            raise KDError(f"{subject.name}: the process that measures its memory has not ended after {limit}") from None
    if done.returncode != 0:
        raise KDError(f"{subject.name} could not be loaded in a process of its own: {done.stderr.strip()[-300:]}")
    return int(done.stdout)


def document(rows: Sequence[Mapping[str, Any]], command: str, threads: int, run: str) -> dict[str, Any]:
    """Return the result: the rows, with each one's ratios to the teacher (or else the student)."""
    from kd_lightning.evaluation.profiling import environment
    from kd_lightning.evaluation.report.build import to_plain

    base = next((row for row in rows if row["kind"] == "teacher"), rows[0])
    compared = []
    for row in rows:
        faster = base["latency_ms"]["p50"] / row["latency_ms"]["p50"]
        smaller = base["file_bytes"] / row["file_bytes"]
        compared.append({**row, "times_faster": faster, "times_smaller": smaller})
    plain: dict[str, Any] = to_plain({
        "run": run, "command": command, "threads": threads, "against": base["name"], "rows": compared,
        "environment": environment(),
    })  # fmt: skip
    return plain


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table as text: a heading and a row for each model."""
    from kd_lightning.evaluation.report.table import MISSING, file_size, short

    heading = ["", result["rows"][0]["score"]["title"], "p50 / p95, ms", "times faster"]
    heading += [f"examples/s ({size})" for size in result["rows"][0]["throughput"]]
    heading += ["peak memory", "file", "times smaller"]
    rows = [heading]
    for row in result["rows"]:
        latency = f"{short(row['latency_ms']['p50'])} / {short(row['latency_ms']['p95'])}"
        value = row["score"]["value"]
        score = MISSING if value is None else f"{value:.4f}"
        cells = [row["name"], score, latency, f"{row['times_faster']:.1f}"]
        cells += [MISSING if value is None else short(value) for value in row["throughput"].values()]
        cells += [file_size(row["peak_memory_bytes"]), file_size(row["file_bytes"]), f"{row['times_smaller']:.1f}"]
        rows.append(cells)
    return rows


def picture(result: Mapping[str, Any], file: Path) -> None:
    """Draw latency and file size of each, as bars."""
    from matplotlib.figure import Figure

    rows = result["rows"][::-1]
    names = [drawn(row["name"]) for row in rows]
    figure = Figure(figsize=(11, 1.2 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, [row["latency_ms"]["p50"] for row in rows], "ms for one example (median)", "{:.3g}"),
        (right, [row["file_bytes"] / 1e6 for row in rows], "MB on disk", "{:.3g}"),
    )
    colours = ["#b0b0b0" if row["kind"] == "teacher" else "#1b6ca8" for row in rows]
    for axes, values, title, label in panels:
        bars = axes.barh(range(len(rows)), values, color=colours)
        axes.set_yticks(range(len(rows)), names)
        axes.bar_label(bars, [f" {label.format(value)}" for value in values], fontsize=9)
        axes.set_xlabel(title)
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table in Markdown, with a line about where it was measured."""
    from kd_lightning.evaluation.report.table import as_markdown

    machine = result["environment"]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    where = f"{machine['cpu']}, {threads}, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    memory = (
        "Peak memory is a process's own: of onnx with onnxruntime alone, of pt2 with torch, of others with Lightning"
    )
    score = result["rows"][0]["score"]["title"]
    against = (
        f"{score[0].upper()}{score[1:]} on the validation split. Times faster and smaller: than {result['against']}"
    )
    return f"{as_markdown(table_rows(result))}\n\n{against}. {memory}. {code(result['command'])}, {where}."


def write(result: Mapping[str, Any], out: Path) -> None:
    """Write `benchmark.json`, `benchmark.md` and `benchmark.png` into a folder that was not there."""
    from kd_lightning.export.write import filled
    from kd_lightning.runtime.files import write_file
    from kd_lightning.runtime.fingerprints import write_json

    with filled(out) as folder:
        write_json(folder / "benchmark.json", result)
        write_file(folder / "benchmark.md", markdown(result) + "\n")
        picture(result, folder / "benchmark.png")
