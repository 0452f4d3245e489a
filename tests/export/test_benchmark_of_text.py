"""The benchmark of language models: how fast they generate, and what they draft for the run's teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_lightning.data.corpus.blocks import unpacked
from kd_lightning.export.benchmark import benchmark, peak_memory, subjects_of
from kd_lightning.export.source import run_data
from tests.export.conftest import Exports
from tests.export.runs import lm_run

SPEEDS = ("first_token_ms", "prefill_per_second", "decode_per_second")

pytest.importorskip("onnx", reason="the extra `export` is not installed")


@pytest.fixture(scope="module")
def llama(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is a small Llama. Read only."""
    return lm_run(tmp_path_factory.mktemp("llama") / "llama")


def test_a_benchmark_is_of_generation(
    llama: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's teacher is its student's like, so that all that it drafts is accepted; the graph in onnxruntime too."""
    monkeypatch.setattr("kd_lightning.export.benchmark.peak_memory", lambda *_: 10**8)
    onnx = exports(llama, "onnx")
    result, out = benchmark([llama, onnx], out=tmp_path / "measured")
    rows = {row["kind"]: row for row in result["rows"]}
    assert set(rows) == {"teacher", "student", "onnx"}
    for row in rows.values():
        assert row["generation"]["new_tokens"] == 12
        assert min(row["generation"][name] for name in SPEEDS) > 0
        assert row["times_faster"] == pytest.approx(
            row["generation"]["decode_per_second"] / rows["teacher"]["generation"]["decode_per_second"]
        )
        assert row["score"]["value"] == pytest.approx(rows["student"]["score"]["value"], rel=1e-4)
        assert "throughput" not in row
    assert rows["teacher"]["draft"] is None
    assert rows["student"]["draft"]["greedy"]["rate"] == rows["onnx"]["draft"]["greedy"]["rate"] == 1.0
    assert rows["student"]["draft"]["sampled"]["rate"] == 1.0
    text = (out / "benchmark.md").read_text(encoding="utf-8")
    assert "| decode, tokens/s |" in text
    assert "| 1.00 / 1.00 |" in text
    assert "As a draft model of teacher" in text


@pytest.mark.slow
def test_the_memory_of_a_graph_is_that_of_onnxruntime_alone(llama: Path, exports: Exports) -> None:
    subjects, stage = subjects_of([llama, exports(llama, "onnx")], 1)
    own = run_data(stage).select(tokens="student")
    batches = unpacked(next(iter(own.val_dataloader())))[:1]
    peak = {subject.kind: peak_memory(subject, batches, 1) for subject in subjects if subject.kind != "teacher"}
    assert 0 < peak["onnx"] < peak["student"] / 1.5
