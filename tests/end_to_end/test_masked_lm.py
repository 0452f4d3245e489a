"""Masked language models whole: one run, small and offline, and what is made of it."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd_lightning.export.source import run_data
from kd_lightning.models.masked_lm import MaskedLM
from kd_lightning.training.run_folder import load_run
from tests.data.corpus.texts import made, written
from tests.forks import command

SMALL = [
    "data=masked_text", "data.tokenizer=wordpiece:120", "data.block_size=24", "data.batch_size=16", "data.mask_sets=2",
    "model@teacher.network=masked_lm_small", "teacher.network.hidden_size=32", "teacher.network.num_layers=2",
    "model@student=masked_lm_small", "student.hidden_size=16", "student.num_layers=1",
    "distillation=sparse_kd", "+distillation.terms.relations._target_=kd_lightning.losses.minilmv2.MiniLMv2Loss",
    "+distillation.terms.relations.relation_heads=4", "+distillation.weights.relations=0.1",
    "teacher.cache_top_k=8", "teacher.cache_dtype=float16", "teacher.precision=float32",
    "teacher.trainer.precision=32-true", "trainer.precision=32-true", "temperature=1", "alpha=0.5",
    "teacher.trainer.max_epochs=4", "trainer.max_epochs=4", "teacher.optimizer.lr=0.005", "optimizer.lr=0.005",
    "teacher.validations=2", "validations=2", "checkpoint_every_n_steps=5",
    "+callbacks.kill={_target_: tests.killer.KillAt, stage: distill}", "stages=[teacher,baseline,distill]",
]  # fmt: skip
MASKED = "the [MASK] of this country have built a great [MASK] ."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"KD_LIGHTNING_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}


def of_command(home: dict[str, str], *line: str, cwd: Path) -> str:
    ended = command(*line, cwd=cwd, environment=home)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str]) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("masked")
    train = written(folder, made(80))
    said = of_command(home, "kd-train", *SMALL, f"data.train_file={train}", f"run_dir={folder / 'run'}", cwd=folder)
    (folder / "said.txt").write_text(said)
    return folder / "run"


def test_the_report_compares_masked_tokens(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["monitor"] == "cross_entropy"
    for model in report["models"].values():
        test = {name: one["mean"] for name, one in model["test"].items()}
        assert {"accuracy", "perplexity"} <= test.keys()
        assert test["perplexity"] == pytest.approx(math.exp(test["cross_entropy"]), rel=1e-4)
    assert 0 < report["data"]["chance_score"] < math.log(120)
    assert report["models"]["distilled"]["test"]["kl_to_teacher"]["mean"] > 0
    text = (run / "report.md").read_text()
    for line in ("| cross-entropy of a masked token, nats |", "| perplexity |", "| agreement with teacher |"):
        assert line in text
    assert "student from text" in text


def test_the_teachers_outputs_were_kept_for_masked_tokens_only(
    run: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight likeliest tokens, their ids and the tail at 15% of the tokens, beside queries, keys and values of all."""
    monkeypatch.setenv("KD_LIGHTNING_HOME", home["KD_LIGHTNING_HOME"])
    found = re.search(r"([\d.]+) kB an example", (run.parent / "said.txt").read_text())
    assert found is not None
    tokens = float(run_data(run / "seed_0" / "distill").lengths.mean())
    inside, masked = 3 * 32 * 2, 8 * (2 + 2) + 4
    assert float(found[1]) * 1000 == pytest.approx(tokens * inside + 0.15 * (tokens - 2) * masked, rel=0.04)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(run: Path, home: dict[str, str]) -> None:
    folder = run.with_name("killed")
    line = ["kd-train", *SMALL[:-1], f"data.train_file={run.parent / 'corpus.jsonl'}", f"run_dir={folder}"]
    line += [f"teacher.checkpoint={run}", "stages=[distill]"]
    killed = command(*line, cwd=run.parent, environment={**home, "KILL_AT_STEP": "8"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "seed_0" / "distill" / "checkpoints" / "resume.ckpt").is_file()
    of_command(home, *line, cwd=run.parent)
    whole, resumed = (load_file(one / "seed_0" / "distill" / "model.safetensors") for one in (run, folder))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def predicted(home: dict[str, str], model: Path, *texts: str) -> list[dict[str, Any]]:
    out = of_command(home, "kd-predict", str(model), *texts, "--json", cwd=model.parent)
    return [json.loads(line) for line in out.splitlines()]


def test_the_likeliest_tokens_at_each_mask_are_predicted(run: Path, home: dict[str, str]) -> None:
    rows = predicted(home, run, MASKED, "", "its [MASK]")
    assert [len(row["masks"] or ()) for row in rows] == [2, 0, 1]
    for mask in (*rows[0]["masks"], *rows[2]["masks"]):
        assert len(mask["tokens"]) == len(mask["probabilities"]) == 5
        assert 1 >= sum(mask["probabilities"]) > 0
        assert mask["probabilities"] == sorted(mask["probabilities"], reverse=True)
    table = of_command(home, "kd-predict", str(run), "its [MASK]", cwd=run.parent)
    assert "mask 1" in table
    assert rows[2]["masks"][0]["tokens"][0] in table
    wrong = command("kd-predict", str(run), "no mask at all", cwd=run.parent, environment=home)
    assert wrong.returncode == 2
    assert "text 1: no [MASK] in 'no mask at all'" in wrong.stderr
    file = command("kd-eval", str(run), "--file", "corpus.jsonl", cwd=run.parent, environment=home)
    assert "score it on its own splits, without --file" in file.stderr


def test_scores_of_a_split_are_those_of_the_report(run: Path, home: dict[str, str]) -> None:
    out = json.loads(of_command(home, "kd-eval", str(run), "--split", "test", "--json", cwd=run.parent))
    report = json.loads((run / "report.json").read_text())
    expected = report["models"]["distilled"]["test"]["cross_entropy"]["mean"]
    assert out["cross_entropy"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("format", ["safetensors", "huggingface", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports_predict_the_same_tokens(run: Path, home: dict[str, str], tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="the optional extra `export` is not installed")
    folder = tmp_path / format
    of_command(home, "kd-export", str(run), "--format", format, "--out", str(folder), cwd=tmp_path)
    exported = json.loads((folder / "export.json").read_text())
    assert exported["parity"]["agreement"] >= 0.999
    assert exported["inputs"] == ["input_ids", "attention_mask"]
    ours = predicted(home, run, MASKED)[0]["masks"]
    theirs = predicted(home, folder, MASKED)[0]["masks"]
    assert [mask["tokens"] for mask in ours] == [mask["tokens"] for mask in theirs]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "| perplexity |" in card
    if format == "huggingface":
        from transformers import pipeline

        fill = pipeline("fill-mask", str(folder))
        for mask, found in zip(ours, fill(MASKED), strict=True):
            assert [one["token_str"] for one in found] == mask["tokens"]
            assert [one["score"] for one in found] == pytest.approx(mask["probabilities"], rel=1e-4)


@pytest.mark.parametrize("format", ["gguf", "peft", "sentence_transformers"])
def test_other_formats_are_refused_in_a_line(run: Path, home: dict[str, str], tmp_path: Path, format: str) -> None:
    ended = command(
        "kd-export", str(run), "--format", format, "--out", str(tmp_path / "out"), cwd=tmp_path, environment=home
    )
    assert ended.returncode == 2
    assert f"format {format}" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_the_network_predicts_what_transformers_does(run: Path) -> None:
    model = load_run(run)
    assert isinstance(model.network, MaskedLM)
    assert type(model.network.network).__name__ == "BertForMaskedLM"
    assert model.task.monitor == "cross_entropy"


@pytest.mark.slow
def test_a_classifier_starts_from_the_student(run: Path, home: dict[str, str]) -> None:
    """After a step at a rate of nearly nothing its body has the weights of the student."""
    rows = "".join(f"{text},{label}\n" for text, label in zip(made(40, seed=3), "ab" * 20, strict=True))
    (run.parent / "labels.csv").write_text("text,label\n" + rows)
    folder = run.with_name("classifier")
    of_command(
        home, "kd-train", "data=text_files", "data.train_file=labels.csv", "stages=[baseline]",
        "model@student=from_run", f"student.checkpoint={run}", f"data.tokenizer={run / 'seed_0/distill/tokenizer'}",
        "data.max_length=24", "data.views=0", "optimizer.lr=1e-12", "trainer.max_steps=1",
        "model@teacher.network=lstm_teacher", f"run_dir={folder}", cwd=run.parent,
    )  # fmt: skip
    started = load_file(folder / "seed_0" / "baseline_initialised" / "model.safetensors")
    body = load_file(run / "seed_0" / "distill" / "model.safetensors")
    shared = {name.removeprefix("network.bert."): value for name, value in body.items() if ".bert." in name}
    assert len(shared) > 10
    for name, value in shared.items():
        torch.testing.assert_close(started[f"encoder.{name}"], value, rtol=0, atol=1e-9)
