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
from tests.export.fresh import OURS, answers, example
from tests.export.test_formats import export
from tests.export.test_refusals import refusal
from tests.whole_split import text_logits

SENTENCES = ["a superb film, lovely actor", "an awful battery", "the senate again"]


def test_a_regression_is_a_regression_to_transformers(rating: Path, tmp_path: Path) -> None:
    out = export(rating, tmp_path / "out", "huggingface")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "regression"
    scores = text_logits(load_run(rating), [(text,) for text in SENTENCES]).reshape(-1).tolist()
    found = answers(example("transformers"), out, SENTENCES, OURS, tmp_path)
    assert [one["p"] for one in found] == pytest.approx(scores, abs=2e-4), "a sigmoid stands before the score"


def test_a_classification_is_one_to_transformers(bert: Path, tmp_path: Path) -> None:
    config = json.loads((export(bert, tmp_path / "out", "huggingface") / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize("student", ["rating", "several"])
def test_onnx_holds_both(request: pytest.FixtureRequest, tmp_path: Path, student: str) -> None:
    run = request.getfixturevalue(student)
    out = export(run, tmp_path / "out", "onnx")
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


@pytest.mark.parametrize(("format", "word"), [("onnx", "onnxruntime"), ("pt2", "torch")])
def test_the_examples_print_the_score_of_a_regression(rating: Path, tmp_path: Path, format: str, word: str) -> None:
    out = export(rating, tmp_path / "out", format)
    scores = text_logits(load_run(rating), [(text,) for text in SENTENCES]).reshape(-1).tolist()
    found = answers(example(word), out, SENTENCES, OURS, tmp_path)
    assert [one["score"] for one in found] == pytest.approx(scores, abs=2e-4)
    assert not any("p" in one for one in found)
