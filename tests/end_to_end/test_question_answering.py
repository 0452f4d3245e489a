"""Question answering whole: one run, small and offline, and what is made of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering

from kd_lightning.training.run_folder import load_run
from tests.forks import command
from tests.toy_questions import records, write_jsonl

SMALL = [
    "data=question_files", "data.tokenizer=wordpiece:120", "data.batch_size=16", "data.max_length=40", "data.stride=7",
    "data.max_question_length=12", "distillation=span_soft_target",
    "model@teacher.network=lstm_teacher", "teacher.network.embedding_size=16", "teacher.network.hidden_size=16",
    "model@student=transformer", "student.hidden_size=16", "student.num_layers=1", "student.intermediate_size=32",
    "student.dropout=0.1", "checkpoint_every_n_steps=7",
    "+callbacks.kill={_target_: tests.killer.KillAt, stage: distill}",
    "teacher.trainer.max_epochs=14", "teacher.trainer.precision=32-true", "teacher.precision=float32",
    "teacher.optimizer.lr=0.02", "trainer.max_epochs=14", "optimizer.lr=0.01", "teacher.validations=2", "validations=2",
    "stages=[teacher,baseline,distill]",
]  # fmt: skip

LONG = "Ada likes tea . " * 11 + "Kai lives in Cairo ."
PAIRS = [
    "Where does Ada live ?\tLin likes tea . Ada lives in Lima .", f"Where does Kai live ?\t{LONG}",
    "Where does Zoe live ?\tZoe likes old trains . Mia likes chess .",
    "Where does Omar live ?\tOmar lives in Oslo . Omar likes rain .",
]  # fmt: skip
ROWS = [dict(zip(("question", "context"), pair.split("\t"), strict=True)) for pair in PAIRS]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"KD_LIGHTNING_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str]) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("questions")
    train = write_jsonl(folder / "train.jsonl")
    of_command(home, "kd-train", *SMALL, f"data.train_file={train}", f"run_dir={folder / 'run'}", cwd=folder)
    return folder / "run"


def of_command(home: dict[str, str], *line: str, cwd: Path) -> str:
    ended = command(*line, cwd=cwd, environment=home)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_report_compares_f1_by_question(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["monitor"] == "f1"
    for model in report["models"].values():
        assert {"f1", "exact_match", "has_answer/f1", "no_answer/f1"} <= set(model["test"])
        assert model["test"]["has_answer/f1"]["mean"] > 0.6
    text = (run / "report.md").read_text()
    for line in ("| F1 |", "| exact match |", "| F1, questions without |", "| agreement with teacher |"):
        assert line in text
    assert "question" in text


def test_a_killed_run_goes_on_to_the_same_weights(run: Path, home: dict[str, str]) -> None:
    folder = run.with_name("killed")
    line = ["kd-train", *SMALL[:-1], f"data.train_file={run.parent / 'train.jsonl'}", f"run_dir={folder}"]
    line.append("stages=[teacher,distill]")
    killed = command(*line, cwd=run.parent, environment={**home, "KILL_AT_STEP": "11"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    of_command(home, *line, cwd=run.parent)
    whole, resumed = (load_file(one / "seed_0" / "distill" / "model.safetensors") for one in (run, folder))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_cached_outputs_teach_as_live_ones_do(run: Path, home: dict[str, str]) -> None:
    folder = run.with_name("live")
    line = [*SMALL[:-1], f"data.train_file={run.parent / 'train.jsonl'}", "teacher.cache=off", "stages=[distill]"]
    of_command(home, "kd-train", *line, f"teacher.checkpoint={run}", f"run_dir={folder}", cwd=run.parent)
    cached, live = (load_file(one / "seed_0" / "distill" / "model.safetensors") for one in (run, folder))
    for name, tensor in cached.items():
        torch.testing.assert_close(live[name], tensor, rtol=1e-3, atol=1e-4)


def predicted(home: dict[str, str], model: Path, *more: str) -> list[dict[str, Any]]:
    out = of_command(home, "kd-predict", str(model), *more, "--json", cwd=model.parent)
    return [json.loads(line) for line in out.splitlines()]


def test_predictions_are_spans_of_the_context(run: Path, home: dict[str, str]) -> None:
    *rows, nothing = predicted(home, run, *PAIRS, "")
    assert nothing["answer"] is nothing["score"] is None
    assert [row["answer"] for row in rows] == ["Lima", "Cairo", None, "Oslo"]
    for row, pair in zip(rows, PAIRS, strict=True):
        assert row["text"] == pair
        if row["answer"] is not None:
            assert pair.split("\t")[1][row["start"] : row["end"]] == row["answer"]
        assert 0 < row["score"] <= 1
    file = write_jsonl(run.parent / "ask.jsonl", ROWS)
    assert predicted(home, run, "--file", str(file)) == rows
    table = of_command(home, "kd-predict", str(run), PAIRS[0], cwd=run.parent)
    assert "answer" in table
    assert "Lima" in table


def test_scores_of_a_split_are_those_of_the_report_and_of_predictions(run: Path, home: dict[str, str]) -> None:
    out = json.loads(of_command(home, "kd-eval", str(run), "--split", "test", "--json", cwd=run.parent))
    report = json.loads((run / "report.json").read_text())
    assert out["f1"] == pytest.approx(report["models"]["distilled"]["test"]["f1"]["mean"])
    from kd_lightning.export.source import run_data
    from kd_lightning.tasks.spans import exact_match, overlap_f1

    questions = run_data(run / "seed_0" / "distill").read().test  # type: ignore[attr-defined]
    file = write_jsonl(run.parent / "test.jsonl", [{"question": q.text, "context": q.context} for q in questions])
    found = predicted(home, run, "--file", str(file))
    pairs = [(row["answer"] or "", [one.text for one in q.answers]) for row, q in zip(found, questions, strict=True)]
    assert out["f1"] == pytest.approx(np.mean([overlap_f1(*pair) for pair in pairs]))
    assert out["exact_match"] == pytest.approx(np.mean([exact_match(*pair) for pair in pairs]))


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "onnx"])
def test_exports_find_the_same_spans(run: Path, home: dict[str, str], tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="the optional extra `export` is not installed")
    folder = tmp_path / format
    of_command(home, "kd-export", str(run), "--format", format, "--out", str(folder), cwd=tmp_path)
    exported = json.loads((folder / "export.json").read_text())
    assert exported["parity"]["agreement"] >= 0.999
    assert exported["parity"]["student"]["f1"] == pytest.approx(exported["parity"]["export"]["f1"])
    assert exported["parity"]["student_intervals"]["f1"] is not None
    file = write_jsonl(tmp_path / "ask.jsonl", ROWS)
    assert predicted(home, folder, "--file", str(file)) == predicted(home, run, *PAIRS)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card
    assert " validation windows, which decided" in card
    assert "of the first and the last token of the answer, where the first token stands for no answer" in card
    if format == "huggingface":
        check_transformers(folder, load_run(run).network)
    if format == "onnx":
        check_pipeline(folder, predicted(home, run, *PAIRS))


def encoded(folder: Path, pair: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)(*pair.split("\t"), return_tensors="pt", return_offsets_mapping=True)


def check_transformers(folder: Path, network: Any) -> None:
    """The folder is of a class for question answering, with equal logits."""
    theirs = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "BertForQuestionAnswering"
    given = encoded(folder, PAIRS[0])
    given.pop("offset_mapping")
    with torch.inference_mode():
        output, ours = theirs(**given), network.eval()(**given).logits
    assert torch.equal(torch.stack([output.start_logits, output.end_logits], -1), ours)


def check_pipeline(folder: Path, rows: list[dict[str, Any]]) -> None:
    """What transformers 4 did in `pipeline("question-answering", handle_impossible_answer=True)`, in onnxruntime alone.

    Softmax over the context's tokens and the first one; the largest product of a start and an end that is not before it
    and at most 30 tokens long; no answer where the first token's product is larger.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    for number in (0, 2, 3):  # those of one window
        given = encoded(folder, PAIRS[number])
        (logits,) = session.run(["logits"], {name: given[name].numpy() for name in names})
        kept = np.array([one == 1 for one in given.sequence_ids(0)])
        kept[0] = True
        start, end = (np.exp(logits[0, :, side] - logits[0, kept, side].max()) * kept for side in (0, 1))
        start, end = start / start.sum(), end / end.sum()
        none = start[0] * end[0]
        start[0] = end[0] = 0.0
        products = np.tril(np.triu(np.outer(start, end)), 29)
        first, last = np.unravel_index(products.argmax(), products.shape)
        places = given["offset_mapping"][0]
        span = (None, None) if none > products.max() else (int(places[first, 0]), int(places[last, 1]))
        assert (rows[number]["start"], rows[number]["end"]) == span
        assert rows[number]["score"] == pytest.approx(max(none, products.max()), abs=1e-4)


def test_losses_on_classes_are_refused_in_one_line(run: Path, home: dict[str, str]) -> None:
    line = [one for one in SMALL if not one.startswith("distillation=")]
    line += [f"data.train_file={run.parent / 'train.jsonl'}", f"run_dir={run.with_name('classes')}"]
    ended = command("kd-train", *line, cwd=run.parent, environment=home)
    assert ended.returncode != 0
    assert "distillation=span_soft_target or another for spans" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_finished_network_of_transformers_teaches(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "teacher" / "tokenizer")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForQuestionAnswering(config).save_pretrained(tmp_path / "finished")
    tokenizer.save_pretrained(tmp_path / "finished")
    line = [
        *(one for one in SMALL[:-1] if not one.startswith(("teacher.network.", "model@teacher", "data.tokenizer"))),
        f"data.train_file={write_jsonl(tmp_path / 'few.jsonl', records(40))}",
        f"data.tokenizer={tmp_path / 'finished'}",
        f"teacher.checkpoint={tmp_path / 'finished'}", "stages=[distill]", "trainer.max_epochs=1",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    of_command(home, "kd-train", *line, cwd=tmp_path)
    assert (tmp_path / "run" / "report.json").is_file()
