"""Measures speed, size and accuracy of a run's teacher, its student and their exports, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.config.trust import trusts_all
from kd_lightning.data.corpus.blocks import unpacked
from kd_lightning.export.benchmark_files import token_ms, write
from kd_lightning.export.exported import copy_export, is_export, read_exported
from kd_lightning.export.source import find_student, role_of, run_data
from kd_lightning.runtime.borders import tell
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
        file: What is loaded.
        bytes: Size of its weights.
        model: The loaded model.
        role: Whose tokens it uses.
        run: The run that it was found in; None for an export.
        of: `teacher` or `student`, of which it is or which it exports.
    """

    name: str
    kind: str
    folder: Path
    file: Path
    bytes: int
    model: TrainedModel
    role: Any
    run: Path | None = None
    of: str = "student"


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
    from kd_lightning.export.write import check_vacant, filled

    if threads < 1:
        raise ConfigError(f"--threads {threads}: expected 1 or more")
    run = next((folder for folder in folders if not is_export(folder)), folders[0])
    out = out or run / "benchmark"
    check_vacant(out)
    subjects, stage = subjects_of(folders, threads, seed)
    with filled(out) as folder:
        rivals, unmeasured = in_eight_bits(subjects, folder, threads, run / "benchmark")
        at = next(place for place, one in enumerate(subjects) if one.kind == "student")
        rows = measure([*subjects[:at], *rivals, *subjects[at:]], stage, threads)
        result = document(rows, command, threads, str(run), unmeasured)
        write(result, folder)
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

    model, file = load_run(stage), stage / "model.safetensors"
    return Subject(name, kind, stage, file, file.stat().st_size, model, role_of(stage), run, kind)


def in_eight_bits(
    subjects: Sequence[Subject], folder: Path, threads: int, earlier: Path
) -> tuple[list[Subject], dict[str, str]]:
    """Export each teacher as ONNX in 8 bits: the rival that a student must beat.

    Not of language models, which these 8 bits ruin.

    Args:
        subjects: The models, teachers among them.
        folder: Where the exports go, as `teacher-XXXXXXXX` with the first digits of the weights' sha256.
        threads: CPU threads of each.
        earlier: A folder of an earlier benchmark, whose exports of these very weights are copied.

    Returns:
        The exports, and by row why one is missing.
    """
    from kd_lightning.export.write import Plan, export
    from kd_lightning.training.run_folder import read_stage

    found: list[Subject] = []
    unmeasured: dict[str, str] = {}
    for one in subjects:
        if one.kind != "teacher" or one.run is None or one.model.task.generates:
            continue
        title, weights = f"{one.name}, onnx int8-dynamic", read_stage(one.folder)["files"][one.file.name]
        out = folder / f"teacher-{weights[:8]}"
        try:
            if not _reused(earlier / out.name, out, weights):
                tell(f"{one.name}: exporting it as ONNX in 8 bits")
                command = f"kd-benchmark {one.run}"
                export(Plan(one.run, one.folder, "onnx", "int8-dynamic", out, command, card=False))
            own = _exported(out, threads, [one])
        except KDError as error:
            tell(f"{title}: not measured ({error})")
            unmeasured[title] = str(error)
            continue
        found.append(replace(own, name=title, of="teacher"))
    return found, unmeasured


def _reused(earlier: Path, out: Path, weights: str) -> bool:
    """Copy an earlier export of these weights, if it is one; otherwise a line says why not."""
    if not is_export(earlier):
        return False
    try:
        copy_export(earlier, out, "onnx", "int8-dynamic", weights)
    except KDError as error:
        tell(f"{earlier} is not used: {error}")
        return False
    return True


def _exported(folder: Path, threads: int, before: Sequence[Subject]) -> Subject:
    from kd_lightning.export.load import load_export

    exported = read_exported(folder)
    model = load_export(folder, threads)
    name = exported.title if folder.name == exported.title else f"{exported.title} ({folder.name})"
    role = next((subject.role for subject in before if subject.kind == "student"), before[0].role)
    return Subject(name, exported.format, folder, folder / exported.model, exported.bytes, model, role)


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
        s.name: FrozenTeacher(s.model.network, teacher_precision(s.folder, s.run))
        if s.role == "teacher" and s.run is not None
        else of_network(s.model.network)
        for s in subjects
    }  # fmt: skip
    student = next(subject.name for subject in subjects if subject.kind == "student")
    read = whole.select(tokens="both" if "teacher" in data else "student")
    alone = (one for batch in read.val_dataloader() for one in unpacked(batch))  # graphs do not keep documents apart
    evaluated = evaluate_all(task, models, alone, reference=student)
    size = 1 if task.generates or task.fills else SIZES[-1]  # a block's logits are large
    largest = {role: [unpacked(batch)[0] for batch in _batches(own, size)[:2]] for role, own in data.items()}
    rows = []
    for subject in subjects:
        scores = evaluated[subject.name].scores
        rows.append({
            "name": subject.name,
            "kind": subject.kind,
            "of": subject.of,
            **speeds[subject.name],
            "peak_memory_bytes": peak_memory(subject, largest[subject.role], threads),
            "file_bytes": subject.bytes,
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

    kinds = ("onnx",) if subject.model.task.generates else ("onnx", "pt2", "openvino", "executorch")
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


def document(
    rows: Sequence[Mapping[str, Any]], command: str, threads: int, run: str, unmeasured: Mapping[str, str]
) -> dict[str, Any]:
    """Return the result: the rows, with each one's ratios to the teacher (or else the student)."""
    from kd_lightning.evaluation.profiling import environment
    from kd_lightning.evaluation.report.build import to_plain

    base = next((row for row in rows if row["kind"] == "teacher"), rows[0])
    compared = []
    for row in rows:
        ours, theirs = token_ms(row), token_ms(base)
        faster = theirs / ours if ours and theirs else None
        smaller = base["file_bytes"] / row["file_bytes"]
        compared.append({**row, "times_faster": faster, "times_smaller": smaller})
    plain: dict[str, Any] = to_plain({
        "run": run, "command": command, "threads": threads, "against": base["name"], "rows": compared,
        "unmeasured": unmeasured, "environment": environment(),
    })  # fmt: skip
    return plain
