"""Students that rate, and students of several tasks: each format says what the student says, or is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from kd_lightning.export.exported import read_exported
from kd_lightning.export.load import load_export
from kd_lightning.training.run_folder import load_run
from tests.export.conftest import Exports
from tests.export.test_refusals import refusal
from tests.whole_split import text_logits

SENTENCES = ["a superb film, lovely actor", "an awful battery", "the senate again"]


def test_a_regression_is_one_to_transformers(rating: Path, exports: Exports) -> None:
    config = json.loads((exports(rating, "huggingface") / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "regression"


@pytest.mark.parametrize("student", ["rating", "several"])
def test_onnx_holds_both(request: pytest.FixtureRequest, exports: Exports, student: str) -> None:
    run = request.getfixturevalue(student)
    out = exports(run, "onnx")
    parity = read_exported(out).parity
    assert parity["agreement"] == (None if student == "rating" else 1.0)
    assert all(math.isfinite(value) for value in parity["student"].values())
    texts = [(text,) for text in SENTENCES]
    torch.testing.assert_close(
        text_logits(load_export(out), texts), text_logits(load_run(run), texts), atol=1e-4, rtol=1e-4
    )
    text = ModelCard.load(out / "README.md").text
    for score in ("RMSE",) if student == "rating" else ("domain: accuracy", "rating: RMSE", "average over tasks"):
        assert f"| {score} |" in text


def test_several_tasks_are_refused_before_anything_is_written(several: Path, tmp_path: Path) -> None:
    says = refusal(tmp_path, several, "--format", "huggingface")
    assert "has 2 tasks (domain, rating)" in says
    assert "use safetensors, pt2, onnx" in says
