"""Fail unless the quickstart's report is whole, its teacher good enough, its student exported. Used by CI."""

from __future__ import annotations

import json
import sys
from pathlib import Path

LEAST_TEACHER_ACCURACY = 0.82


def main(path: str) -> None:
    """Check one report.json."""
    report = json.loads(Path(path).read_text())
    models = report["models"]
    for name in ("teacher", "baseline", "distilled"):
        accuracy = models[name]["test"]["accuracy"]
        assert 0.5 < accuracy["mean"] < 1.0, (name, accuracy)
        assert models[name]["size"]["parameters"] > models[name]["size"]["parameters_without_embeddings"] > 0, name
        assert 0 < models[name]["latency_ms"]["p50"] <= models[name]["latency_ms"]["p95"], name
    teacher = models["teacher"]["test"]["accuracy"]["mean"]
    assert teacher >= LEAST_TEACHER_ACCURACY, f"teacher {teacher} < {LEAST_TEACHER_ACCURACY}"
    assert models["distilled"]["latency_ms"]["p50"] < models["teacher"]["latency_ms"]["p50"]
    assert len(report["distillation_ratio"]["values"]) == len(report["seeds"])
    assert report["command"].startswith("kd-train")
    export = Path(path).parent / "onnx-int8"
    assert json.loads((export / "export.json").read_text())["quantize"] == "int8-dynamic"
    assert (export / "model.onnx").is_file()
    assert "onnx int8-dynamic" in (Path(path).parent / "benchmark" / "benchmark.md").read_text()
    print(f"demo: teacher {teacher:.3f}, report whole, student shipped")


if __name__ == "__main__":
    main(sys.argv[1])
