"""The benchmark measures a run's teacher, student and exports, each by the same rules."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kd_lightning.cli.benchmark import main as kd_benchmark
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.export.benchmark import Subject, _reused, benchmark, in_eight_bits, peak_memory, subjects_of
from kd_lightning.export.exported import copy_export, read_exported
from kd_lightning.export.source import find_student
from kd_lightning.export.write import Plan
from kd_lightning.export.write import export as write_export
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.seals import write_sealed
from kd_lightning.training.run_folder import finish_stage, read_stage
from tests.export.conftest import Exports

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


def test_everything_is_measured_and_written(
    bilstm: Path, exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_exports(subject: Subject, *given: Any) -> int:  # which take a process each, as teacher and student would
        return peak_memory(subject, *given) if subject.kind in ("onnx", "pt2") else 10**8

    monkeypatch.setattr("kd_lightning.export.benchmark.peak_memory", of_exports)
    folders = [str(exports(bilstm, *format)) for format in (("onnx", "int8-dynamic"), ("pt2",))]
    kd_benchmark([str(bilstm), *folders, "--threads", "1", "--out", str(tmp_path / "measured"), "--trust"])
    result = json.loads((tmp_path / "measured" / "benchmark.json").read_text(encoding="utf-8"))
    assert [row["kind"] for row in result["rows"]] == ["teacher", "onnx", "student", "onnx", "pt2"]
    rival = result["rows"][1]
    assert (rival["name"], rival["of"]) == ("teacher, onnx int8-dynamic", "teacher")
    assert rival["times_smaller"] > 3
    (kept,) = (tmp_path / "measured").glob("teacher-*")
    assert {path.name for path in kept.iterdir()} >= {"model.onnx", "export.json"}
    assert result["threads"] == 1
    by_kind = {row["kind"]: row for row in result["rows"]}
    for row in result["rows"]:
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
        assert all(row["throughput"][size] > 0 for size in ("1", "8"))
        assert set(row["throughput"]) == {"1", "8", "32", "128"}
        assert row["agreement_with_student"] >= 0.95
        assert row["times_smaller"] == by_kind["teacher"]["file_bytes"] / row["file_bytes"]
    assert by_kind["onnx"]["peak_memory_bytes"] < by_kind["pt2"]["peak_memory_bytes"] / 1.5, "torch was loaded for it"
    assert (tmp_path / "measured" / "benchmark.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "onnx int8-dynamic" in printed
    assert "| student |" in (tmp_path / "measured" / "benchmark.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"threads": 0}, "--threads 0: expected 1 or more"), ({"seed": 9}, "no finished student of seed 9")],
)
def test_options_that_make_no_sense(bilstm: Path, tmp_path: Path, options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        benchmark([bilstm], out=tmp_path / "measured", **options)
    assert not (tmp_path / "measured").exists()


def test_exports_alone_have_nobody_to_ask_about(bilstm: Path, exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a run folder too"):
        benchmark([exports(bilstm, "safetensors")], out=tmp_path / "measured")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no memory, which takes a process for each model, and export no teacher: the first test does."""
    monkeypatch.setattr("kd_lightning.export.benchmark.peak_memory", lambda *_: 10**8)
    monkeypatch.setattr("kd_lightning.export.benchmark.in_eight_bits", lambda *_: ([], {}))


def test_a_teacher_in_eight_bits_is_exported_once_and_what_fails_is_a_line(
    bilstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []

    def export(plan: Plan) -> None:
        made.append(plan.out)
        if len(made) == 1:
            raise KDError("it differs from the student")
        write_export(plan)

    monkeypatch.setattr("kd_lightning.export.write.export", export)
    subjects, _ = subjects_of([bilstm], 1)
    none, unmeasured = in_eight_bits(subjects, tmp_path / "first", 1, tmp_path / "nowhere")
    assert none == []
    assert unmeasured == {"teacher, onnx int8-dynamic": "it differs from the student"}
    assert "teacher, onnx int8-dynamic: not measured (it differs from the student)" in capsys.readouterr().out
    (one,), unmeasured = in_eight_bits(subjects, tmp_path / "second", 1, tmp_path / "nowhere")
    assert unmeasured == {}
    (one.folder / "beside").write_text("not in its seal")
    (again,), _ = in_eight_bits(subjects, tmp_path / "third", 1, tmp_path / "second")
    assert len(made) == 2
    assert not (again.folder / "beside").exists()
    assert (one.name, one.kind, one.of, one.role) == ("teacher, onnx int8-dynamic", "onnx", "teacher", "teacher")
    assert again.file.parent.parent == tmp_path / "third"
    assert again.file.read_bytes() == one.file.read_bytes()


@pytest.mark.usefixtures("no_memory")
def test_why_a_teacher_in_eight_bits_is_missing_is_written(
    bilstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "logits differ by <b>9</b>, allowed 0.5"
    monkeypatch.setattr(
        "kd_lightning.export.benchmark.in_eight_bits", lambda *_: ([], {"teacher, onnx int8-dynamic": reason})
    )
    measured([bilstm], tmp_path / "out")
    written = json.loads((tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8"))
    assert written["unmeasured"] == {"teacher, onnx int8-dynamic": reason}
    page = (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8")
    assert "Not measured: teacher, onnx int8-dynamic (logits differ by" in page
    assert "<b>" not in page


def changed(folder: Path, **keys: str) -> None:
    content = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    write_sealed(folder / "export.json", content | keys)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: changed(folder, format="pt2"), r"has format 'pt2', expected 'onnx'"),
        (lambda folder: changed(folder, quantize="none"), r"has quantize 'none', expected 'int8-dynamic'"),
        (lambda folder: changed(folder, weights="0" * 64), r"has weights '0{64}', expected '"),
        (
            lambda folder: changed(folder, model="../model.onnx"),
            r"names '\.\./model.onnx', which is outside its folder",
        ),
        (lambda folder: (folder / "model.onnx").write_bytes(b"another"), r"model.onnx is damaged"),
        (lambda folder: (folder / "more").symlink_to(folder.parent), r"more is a link or no regular file"),
        (lambda folder: linked(folder / "model.onnx"), r"model.onnx is a link or no regular file"),
        (lambda folder: linked(folder), r"is a link or no regular file"),
        (lambda folder: os.mkfifo(folder / "pipe"), r"pipe is a link or no regular file"),
    ],
    ids=["format", "quantize", "weights", "outside", "damaged", "link", "model", "folder", "pipe"],
)
def test_no_other_model_is_taken_for_the_teacher_in_eight_bits(
    bilstm: Path, exports: Exports, tmp_path: Path, spoil: Callable[[Path], Any], says: str
) -> None:
    made = exports(bilstm, "onnx", "int8-dynamic")
    weights = read_exported(made).weights
    assert weights == hashlib.sha256((find_student(bilstm) / "model.safetensors").read_bytes()).hexdigest()
    earlier = shutil.copytree(made, tmp_path / "earlier")
    copy_export(earlier, tmp_path / "first", "onnx", "int8-dynamic", weights)
    assert read_exported(tmp_path / "first") == read_exported(made)
    spoil(earlier)
    with pytest.raises(KDError, match=says):
        copy_export(earlier, tmp_path / "out", "onnx", "int8-dynamic", weights)
    assert not (tmp_path / "out").exists()
    assert not _reused(earlier, tmp_path / "out", weights)


def linked(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / "moved"))


def measured(folders: list[Path], out: Path) -> list[dict[str, Any]]:
    result, folder = benchmark(folders, out=out)
    assert folder == out
    assert result == json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def without_teacher(run: Path, folder: Path, checkpoint: str) -> Path:
    """A run as it is left where `teacher.checkpoint` was given."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("teacher"))
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, "teacher.checkpoint", checkpoint)
    OmegaConf.save(config, folder / "config.yaml")
    return folder


@pytest.mark.usefixtures("no_memory")
def test_a_teacher_of_another_run_is_measured_too_and_once(
    bilstm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lent = without_teacher(bilstm, tmp_path / "lent", str(bilstm))
    assert [row["name"] for row in measured([lent], tmp_path / "one")] == ["teacher", "student"]
    both = measured([lent, bilstm], tmp_path / "two")
    assert [row["name"] for row in both] == ["lent: teacher", "lent: student", f"{bilstm.name}: student"]
    far = without_teacher(bilstm, tmp_path / "far", "some/name")
    capsys.readouterr()
    rows = measured([far, bilstm], tmp_path / "three")
    assert "far: its teacher is in no run folder here and is not measured" in capsys.readouterr().out
    assert next(row for row in rows if row["kind"] == "teacher")["times_faster"] == 1.0, "all are compared with it"


@pytest.mark.usefixtures("no_memory")
def test_batches_that_the_split_cannot_fill_are_no_figures(bilstm: Path, tmp_path: Path) -> None:
    (_, row) = measured([bilstm], tmp_path / "out")  # 24 examples
    assert [size for size, value in row["throughput"].items() if value is None] == ["32", "128"]
    assert "| – |" in (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_memory")
def test_runs_that_read_other_tokens_are_not_compared(bilstm: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bilstm, tmp_path / "other")
    load_tokenizer("wordpiece:300", ["nothing of the kind"] * 3).save_pretrained(
        str(other / "seed_0/distill/tokenizer")
    )
    finish_stage(other / "seed_0/distill", read_stage(other / "seed_0/distill"))
    with pytest.raises(ConfigError, match=r"other.*uses other tokens than .*: measure it with its own run"):
        benchmark([bilstm, other], out=tmp_path / "out")
