"""Token classification whole: one run, small and offline, and what is made of it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd_lightning.training.run_folder import load_run
from tests.forks import command
from tests.toy_tags import write_conll

SMALL = [
    "data=token_files", "data.tokenizer=wordpiece:120", "data.batch_size=16", "data.max_length=24", "data.stride=8",
    "model@teacher.network=lstm_teacher", "teacher.network.embedding_size=24", "teacher.network.hidden_size=24",
    "model@student=transformer", "student.hidden_size=24", "student.num_layers=1", "student.intermediate_size=48",
    "student.dropout=0.1", "checkpoint_every_n_steps=7",
    "+callbacks.kill={_target_: tests.killer.KillAt, stage: distill}",
    "teacher.trainer.max_epochs=12", "teacher.trainer.precision=32-true", "teacher.precision=float32",
    "teacher.optimizer.lr=0.02", "trainer.max_epochs=12", "optimizer.lr=0.01", "teacher.validations=2", "validations=2",
    "stages=[teacher,baseline,distill]",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"KD_LIGHTNING_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str]) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("tokens")
    train = write_conll(folder / "train.conll")
    ended = command(
        "kd-train", *SMALL, f"data.train_file={train}", f"run_dir={folder / 'run'}", cwd=folder, environment=home
    )
    assert ended.returncode == 0, ended.stderr
    (folder / "said.txt").write_text(ended.stdout)
    return folder / "run"


def of_command(home: dict[str, str], *line: str, cwd: Path) -> str:
    ended = command(*line, cwd=cwd, environment=home)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_report_compares_entity_f1(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["monitor"] == "entity_f1"
    for model in report["models"].values():
        test = model["test"]
        assert {"entity_precision", "entity_recall", "token_accuracy", "LOC/f1", "PER/f1"} <= set(test)
        assert test["entity_f1"]["mean"] > report["data"]["chance_score"]
    text = (run / "report.md").read_text()
    for line in ("| entity F1 |", "| token accuracy |", "| LOC: F1 |", "| agreement with teacher |"):
        assert line in text
    assert "teacher's entity F1" in text


def test_the_teachers_outputs_were_kept_for_words_only(run: Path) -> None:
    said = (run.parent / "said.txt").read_text()
    found = re.search(r"([\d.]+) (k?B|bytes) an example", said)
    assert found is not None
    assert float(found[1]) < 24 * 5 * 4 + 8  # bytes: less than five classes for each of the window's tokens


def test_a_finished_run_is_not_trained_again(run: Path, home: dict[str, str]) -> None:
    weights = (run / "seed_0" / "distill" / "model.safetensors").stat().st_mtime_ns
    again = of_command(
        home, "kd-train", *SMALL, f"data.train_file={run.parent / 'train.conll'}", f"run_dir={run}", cwd=run.parent
    )
    assert (run / "seed_0" / "distill" / "model.safetensors").stat().st_mtime_ns == weights
    assert "step" not in again


def test_a_killed_run_goes_on_to_the_same_weights(run: Path, home: dict[str, str]) -> None:
    folder = run.with_name("killed")
    line = ["kd-train", *SMALL[:-1], f"data.train_file={run.parent / 'train.conll'}", f"run_dir={folder}"]
    line.append("stages=[teacher,distill]")
    killed = command(*line, cwd=run.parent, environment={**home, "KILL_AT_STEP": "11"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "seed_0" / "distill" / "checkpoints" / "resume.ckpt").is_file()
    of_command(home, *line, cwd=run.parent)
    whole, resumed = (load_file(one / "seed_0" / "distill" / "model.safetensors") for one in (run, folder))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def predicted(home: dict[str, str], model: Path, *texts: str) -> list[dict[str, Any]]:
    out = of_command(home, "kd-predict", str(model), *texts, "--json", cwd=model.parent)
    return [json.loads(line) for line in out.splitlines()]


LONG = "today we saw Ada Byron , " + "the old train was late and nobody minded it " * 4 + "in New York ."


def test_predictions_are_spans_of_the_text(run: Path, home: dict[str, str]) -> None:
    rows = predicted(home, run, "we saw Ada Byron in Paris.", LONG, "", "it was late")
    assert [row["text"] for row in rows] == ["we saw Ada Byron in Paris.", LONG, "", "it was late"]
    assert rows[2]["entities"] is None
    for row in (rows[0], rows[1]):
        assert row["entities"]
        for one in row["entities"]:
            assert row["text"][one["start"] : one["end"]] == one["text"]
            assert one["type"] in ("LOC", "PER")
            assert 0 < one["score"] <= 1
    assert max(one["end"] for one in rows[1]["entities"]) > 200  # beyond the first window
    table = of_command(home, "kd-predict", str(run), "we saw Ada Byron in Paris.", cwd=run.parent)
    assert f"{rows[0]['entities'][0]['text']} ({rows[0]['entities'][0]['type']} " in " ".join(table.split())


def test_scores_of_a_split_are_those_of_the_report(run: Path, home: dict[str, str]) -> None:
    out = json.loads(of_command(home, "kd-eval", str(run), "--split", "test", "--json", cwd=run.parent))
    report = json.loads((run / "report.json").read_text())
    assert out["entity_f1"] == pytest.approx(report["models"]["distilled"]["test"]["entity_f1"]["mean"])


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "onnx"])
def test_exports_find_the_same_entities(run: Path, home: dict[str, str], tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="the optional extra `export` is not installed")
    folder = tmp_path / format
    of_command(home, "kd-export", str(run), "--format", format, "--out", str(folder), cwd=tmp_path)
    exported = json.loads((folder / "export.json").read_text())
    assert exported["parity"]["agreement"] >= 0.999
    assert exported["parity"]["student"]["entity_f1"] == pytest.approx(exported["parity"]["export"]["entity_f1"])
    texts = ("we saw Ada Byron in Paris.", LONG)
    assert predicted(home, folder, *texts) == predicted(home, run, *texts)
    card = (folder / "README.md").read_text()
    assert "entity F1" in card
    assert "It reads 24 tokens at a time: cut longer texts into windows" in card
    if format == "huggingface":
        from transformers import pipeline

        find = pipeline("token-classification", str(folder), aggregation_strategy="first")
        found = [(one["entity_group"], one["start"], one["end"]) for one in find(texts[0])]
        assert found == [
            (one["type"], one["start"], one["end"]) for one in predicted(home, run, texts[0])[0]["entities"]
        ]


def test_the_network_is_a_class_of_transformers(run: Path) -> None:
    model = load_run(run)
    assert type(model.network).__name__ == "BertForTokenClassification"
    assert model.task.monitor == "entity_f1"
    assert model.class_names == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_a_teacher_of_other_tokens_teaches_by_words(run: Path, home: dict[str, str]) -> None:
    """It teaches the same from its cache as in every step, and its windows are cut as the student's are."""
    line = [
        *SMALL[:-1], f"data.train_file={run.parent / 'train.conll'}", "data.tokenizer=wordpiece:90",
        f"data.teacher_tokenizer={run / 'teacher' / 'tokenizer'}", f"teacher.checkpoint={run}", "stages=[distill]",
        "data.max_length=32", "trainer.max_epochs=2",
    ]  # fmt: skip
    found = {}
    for cache in ("auto", "off"):
        folder = run.with_name(f"others_{cache}")
        of_command(home, "kd-train", *line, f"run_dir={folder}", f"teacher.cache={cache}", cwd=run.parent)
        found[cache] = load_file(folder / "seed_0" / "distill" / "model.safetensors")
    assert found["auto"].keys() == found["off"].keys()
    for name, tensor in found["auto"].items():
        torch.testing.assert_close(tensor, found["off"][name], rtol=1e-3, atol=1e-4)
    report = json.loads((run.with_name("others_auto") / "report.json").read_text())
    (teacher,) = (json.loads((run / "report.json").read_text())["models"]["teacher"]["test"]["entity_f1"]["values"],)
    assert report["models"]["teacher"]["test"]["entity_f1"]["values"] == pytest.approx(teacher, abs=0.02)
