"""The benchmark measures a run's teacher, student and exports, each by the same rules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kd_lightning.cli.benchmark import main as kd_benchmark
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.export.benchmark import Subject, benchmark, peak_memory
from kd_lightning.runtime.errors import ConfigError
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
    assert [row["kind"] for row in result["rows"]] == ["teacher", "student", "onnx", "pt2"]
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
    """Measure no memory, which takes a process for each model: the first test does."""
    monkeypatch.setattr("kd_lightning.export.benchmark.peak_memory", lambda *_: 10**8)


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


def test_runs_that_read_other_tokens_are_not_compared(bilstm: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bilstm, tmp_path / "other")
    load_tokenizer("wordpiece:300", ["nothing of the kind"] * 3).save_pretrained(
        str(other / "seed_0/distill/tokenizer")
    )
    finish_stage(other / "seed_0/distill", read_stage(other / "seed_0/distill"))
    with pytest.raises(ConfigError, match=r"other.*uses other tokens than .*: measure it with its own run"):
        benchmark([bilstm, other], out=tmp_path / "out")
