"""The benchmark measures a run's teacher, student and exports, each by the same rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_lightning.export.benchmark import main as kd_benchmark
from kd_lightning.export.command import main as kd_export

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")


def test_everything_is_measured_and_written(bilstm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exports = []
    for format, quantize in (("onnx", "int8-dynamic"), ("pt2", "none"), ("safetensors", "fp16")):
        exports.append(str(tmp_path / format))
        kd_export([str(bilstm), "--format", format, "--quantize", quantize, "--out", exports[-1]])
    kd_benchmark([str(bilstm), *exports, "--threads", "1", "--out", str(tmp_path / "measured")])
    result = json.loads((tmp_path / "measured" / "benchmark.json").read_text(encoding="utf-8"))
    assert [row["kind"] for row in result["rows"]] == ["teacher", "student", "onnx", "pt2", "safetensors"]
    assert result["threads"] == 1
    by_kind = {row["kind"]: row for row in result["rows"]}
    for row in result["rows"]:
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
        assert all(value > 0 for value in row["throughput"].values())
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
    [(["--threads", "0"], "--threads 0: expected 1 or more"), (["--seed", "9"], "no finished student of seed 9")],
)
def test_options_that_make_no_sense(bilstm: Path, tmp_path: Path, options: list[str], says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        kd_benchmark([str(bilstm), *options, "--out", str(tmp_path / "measured")])
    assert not (tmp_path / "measured").exists()


def test_exports_alone_have_nobody_to_ask_about(bilstm: Path, tmp_path: Path) -> None:
    kd_export([str(bilstm), "--format", "safetensors", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="give a run folder too"):
        kd_benchmark([str(tmp_path / "out"), "--out", str(tmp_path / "measured")])
