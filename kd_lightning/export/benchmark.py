"""Measures speed, size and accuracy of a run's teacher, its student and their exports, in turns."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.config.trust import trusts_all
from kd_lightning.data.corpus.blocks import unpacked
from kd_lightning.export.exported import is_export, read_exported
from kd_lightning.export.source import find_student, role_of, run_data
from kd_lightning.runtime.borders import code, drawn, tell
from kd_lightning.runtime.borders import markdown as escaped
from kd_lightning.runtime.errors import ConfigError, KDError

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.training.run_folder import TrainedModel
    from kd_lightning.types import Batch

SIZES = (1, 8, 32, 128)
"""Examples in a batch, of which throughput is measured."""
PROMPTS, NEW_TOKENS = 16, 32
"""Of language models: prompts, and how many tokens are generated after each."""

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
    speeds = _generated(subjects, whole, threads) if task.generates else _timed(subjects, data, threads)
    models: dict[str, Model] = {
        s.name: FrozenTeacher(s.model.network, teacher_precision(s.folder, s.run)) if s.role == "teacher"
        else of_network(s.model.network)
        for s in subjects
    }  # fmt: skip
    student = next(subject.name for subject in subjects if subject.kind == "student")
    read = whole.select(tokens="both" if "teacher" in data else "student")
    alone = (one for batch in read.val_dataloader() for one in unpacked(batch))  # graphs do not keep documents apart
    evaluated = evaluate_all(task, models, alone, reference=student)
    size = 1 if task.generates else SIZES[-1]  # a block's logits are large
    largest = {role: [unpacked(batch)[0] for batch in _batches(own, size)[:2]] for role, own in data.items()}
    rows = []
    for subject in subjects:
        scores = evaluated[subject.name].scores
        rows.append({
            "name": subject.name,
            "kind": subject.kind,
            **speeds[subject.name],
            "peak_memory_bytes": peak_memory(subject, largest[subject.role], threads),
            "file_bytes": subject.file.stat().st_size,
            "score": {"title": task.specs[task.monitor].title, "value": scores[task.monitor]},
            "agreement_with_student": scores.get("agreement"),
        })  # fmt: skip
    return rows


def _timed(subjects: Sequence[Subject], data: Mapping[Any, IndexedData], threads: int) -> dict[str, Any]:
    """Return latency and throughput of each subject, on the validation examples as its role reads them."""
    from kd_lightning.evaluation.profiling import measure_latency, measure_throughput

    networks = {one.name: one.model.network for one in subjects}
    alone = {role: _singles(own) for role, own in data.items()}
    latency = measure_latency(networks, {one.name: alone[one.role] for one in subjects}, threads=threads)
    throughput: dict[str, dict[str, float | None]] = {name: dict.fromkeys(map(str, SIZES)) for name in networks}
    held_out = next(iter(data.values())).sizes["validation"]
    for size in [size for size in SIZES if size <= held_out]:
        batches = {role: _batches(own, size) for role, own in data.items()}
        measured = measure_throughput(networks, {one.name: batches[one.role] for one in subjects})
        for name, one in measured.items():
            throughput[name][str(size)] = one.examples_per_second
    return {
        name: {"latency_ms": {"p50": latency[name].p50, "p95": latency[name].p95}, "throughput": throughput[name]}
        for name in networks
    }


def _generated(subjects: Sequence[Subject], data: IndexedData, threads: int) -> dict[str, Any]:
    """Return how fast each subject generates, and what it drafts for the first teacher."""
    from kd_lightning.evaluation.generated import measure_drafts, measure_generation, prompts_of

    networks, size = {one.name: one.model.network for one in subjects}, int(data.input_format["max_length"])
    new = min(NEW_TOKENS, size // 2)
    prompts = prompts_of(data.task, data.select(tokens="student").val_dataloader(), size // 2, size - new, PROMPTS)
    if not prompts:
        raise ConfigError(f"no document of the validation split leaves room for {new} tokens after its prompt")
    generation, drafts = measure_generation(networks, prompts, new, threads), {}
    if teacher := next((one for one in subjects if one.kind == "teacher"), None):
        own = {one.name: one.model.network for one in subjects if one.kind != "teacher"}
        drafts = measure_drafts(teacher.model.network, own, prompts, new)
    return {
        name: {"generation": found and asdict(found), "draft": draft and asdict(draft)}
        for name, found, draft in ((name, generation.get(name), drafts.get(name)) for name in networks)
    }


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

    kinds = ("onnx",) if subject.model.task.generates else ("onnx", "pt2")
    kind = subject.kind if subject.kind in kinds else "folder"
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
        ours, theirs = _token_ms(row), _token_ms(base)
        faster = theirs / ours if ours and theirs else None
        smaller = base["file_bytes"] / row["file_bytes"]
        compared.append({**row, "times_faster": faster, "times_smaller": smaller})
    plain: dict[str, Any] = to_plain({
        "run": run, "command": command, "threads": threads, "against": base["name"], "rows": compared,
        "environment": environment(),
    })  # fmt: skip
    return plain


def _token_ms(row: Mapping[str, Any]) -> float | None:
    """Return the milliseconds of an example or, of a language model, of a token, if measured."""
    if "latency_ms" in row:
        return float(row["latency_ms"]["p50"])
    return 1000 / row["generation"]["decode_per_second"] if row["generation"] else None


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the table as text: a heading and a row for each model."""
    from kd_lightning.evaluation.report.table import GENERATED, MISSING, file_size, generated_cell, short

    first = result["rows"][0]
    sizes = list(first.get("throughput", ()))
    speeds = ["p50 / p95, ms", *(f"examples/s ({size})" for size in sizes)] if sizes else list(GENERATED)
    heading = ["", first["score"]["title"], *speeds[:1], "times faster", *speeds[1:]]
    rows = [[*heading, "peak memory", "file", "times smaller"]]
    for row in result["rows"]:
        if sizes:
            cells = [f"{short(row['latency_ms']['p50'])} / {short(row['latency_ms']['p95'])}"]
            cells += [MISSING if value is None else short(value) for value in row["throughput"].values()]
        else:
            cells = [generated_cell(row, title) for title in speeds]
        value, faster = row["score"]["value"], row["times_faster"]
        score = MISSING if value is None else f"{value:.4f}"
        cells = [row["name"], score, cells[0], MISSING if faster is None else f"{faster:.1f}", *cells[1:]]
        cells += [file_size(row["peak_memory_bytes"]), file_size(row["file_bytes"]), f"{row['times_smaller']:.1f}"]
        rows.append(cells)
    return rows


def picture(result: Mapping[str, Any], file: Path) -> None:
    """Draw latency and file size of each, as bars."""
    from matplotlib.figure import Figure

    rows = result["rows"][::-1]
    one = "example (median)" if "latency_ms" in rows[0] else "token"
    names = [drawn(row["name"]) for row in rows]
    figure = Figure(figsize=(11, 1.2 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, [_token_ms(row) or math.nan for row in rows], f"ms for one {one}", "{:.3g}"),
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
    from kd_lightning.evaluation.report.text import generation_text

    machine = result["environment"]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    where = f"{machine['cpu']}, {threads}, torch {machine['versions']['torch']}, {machine['date'][:10]}"
    title, own = (
        result["rows"][0]["score"]["title"],
        "of onnx with onnxruntime alone, of pt2 with torch, of others with",
    )
    against = (
        f"{title[0].upper()}{title[1:]} on the validation split. Times faster and smaller: than {result['against']}"
    )
    how = escaped(generation_text(result["rows"], result["against"]))
    about = f"{against}. Peak memory is a process's own: {own} Lightning. {how}{' ' * bool(how)}"
    return f"{as_markdown(table_rows(result))}\n\n{about}{code(result['command'])}, {where}."


def write(result: Mapping[str, Any], out: Path) -> None:
    """Write `benchmark.json`, `benchmark.md` and `benchmark.png` into a folder that was not there."""
    from kd_lightning.export.write import filled
    from kd_lightning.runtime.files import write_file
    from kd_lightning.runtime.fingerprints import write_json

    with filled(out) as folder:
        write_json(folder / "benchmark.json", result)
        write_file(folder / "benchmark.md", markdown(result) + "\n")
        picture(result, folder / "benchmark.png")
