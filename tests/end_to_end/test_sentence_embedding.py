"""Sentence embeddings whole: one run, small and offline, and what is made of it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from kd_lightning.data.text.tokens import load_tokenizer, write_tokenizer
from kd_lightning.models.adapt import run_network
from kd_lightning.models.sentence_encoder import SentenceEncoder
from kd_lightning.pipeline.from_run import from_run
from kd_lightning.training.run_folder import load_run, load_stage
from tests.forks import command
from tests.toy_pairs import pairs, write_pairs

WIDTH = 16
SMALL = [
    "data=embedding_files", "data.text_column=query", "data.positive_column=found", "data.batch_size=8",
    "data.max_length=16", f"data.dimensions={WIDTH}", "data.widths=[8]", "distillation=embed_distill",
    "model@student=from_teacher", "student.layers=1", "teacher.cache_dtype=float16", "teacher.precision=float32",
    "trainer.max_epochs=3", "trainer.precision=32-true", "optimizer.lr=0.003", "validations=2",
    "checkpoint_every_n_steps=5", "+callbacks.kill={_target_: tests.killer.KillAt, stage: distill}",
    "stages=[baseline,distill]",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"KD_LIGHTNING_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}


def write_teacher(folder: Path) -> Path:
    """A sentence encoder as transformers writes one: random, so near texts are those with common words."""
    tokenizer = load_tokenizer("wordpiece:200", [text for pair in pairs() for text in pair])
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    return folder


def overrides(folder: Path) -> list[str]:
    return [*SMALL, f"data.train_file={folder / 'pairs.jsonl'}", f"teacher.checkpoint={folder / 'teacher'}"]


def of_command(home: dict[str, str], *line: str, cwd: Path) -> str:
    ended = command(*line, cwd=cwd, environment=home)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str]) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("embeddings")
    write_pairs(folder / "pairs.jsonl")
    write_teacher(folder / "teacher")
    (folder / "told.txt").write_text(
        of_command(home, "kd-train", *overrides(folder), f"run_dir={folder / 'run'}", cwd=folder)
    )
    return folder / "run"


def test_the_report_compares_retrieval(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["monitor"] == "ndcg@10"
    assert set(report["models"]) == {"teacher", "baseline", "baseline_initialised", "distilled"}
    for model in report["models"].values():
        assert {"mrr@10", "recall@1", "recall@10", "ndcg@10/8", "cosine_to_teacher"} <= set(model["test"])
    test = {name: model["test"] for name, model in report["models"].items()}
    assert test["teacher"]["cosine_to_teacher"]["mean"] == pytest.approx(1)
    near = {name: scores["spearman_to_teacher"]["mean"] for name, scores in test.items()}
    assert near["distilled"] > near["baseline_initialised"] + 0.1 > near["baseline"]
    text = (run / "report.md").read_text()
    for line in ("| nDCG@10 |", "| nDCG@10, 8 wide |", "| cosine to teacher |", "student from pairs"):
        assert line in text


def test_one_embedding_a_text_is_cached(run: Path) -> None:
    told = (run.parent / "told.txt").read_text()
    assert f"{2 * WIDTH} bytes an example" in told
    assert re.search(r"for all 120\b", told)


def test_a_killed_run_goes_on_to_the_same_weights(run: Path, home: dict[str, str]) -> None:
    line = ["kd-train", *overrides(run.parent), f"run_dir={run.with_name('killed')}", "stages=[distill]"]
    killed = command(*line, cwd=run.parent, environment={**home, "KILL_AT_STEP": "8"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    of_command(home, *line, cwd=run.parent)
    whole, resumed = (
        load_file(one / "seed_0" / "distill" / "model.safetensors") for one in (run, run.with_name("killed"))
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def predicted(home: dict[str, str], model: Path, *texts: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in of_command(home, "kd-predict", str(model), *texts, "--json", cwd=model.parent).splitlines()
    ]


TEXTS = (
    "mail reader",
    "it plays every chess and is fast",
    "it plays every chess and is fast and small and new and old and free and more",
)


def test_predictions_are_embeddings(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    rows = predicted(home, run, TEXTS[0], "", TEXTS[1])
    assert rows[1]["embedding"] is None
    for row in (rows[0], rows[2]):
        assert np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=1e-5)
    path = tmp_path / "found.npy"
    told = of_command(home, "kd-predict", str(run), TEXTS[0], "", TEXTS[1], "--npy", str(path), cwd=run.parent)
    assert f"3 embeddings of {WIDTH} numbers" in told
    found = np.load(path)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[[0, 2]], [rows[0]["embedding"], rows[2]["embedding"]], atol=1e-6)
    assert np.isnan(found[1]).all()
    again = command("kd-predict", str(run), TEXTS[0], "--npy", str(path), cwd=run.parent, environment=home)
    assert again.returncode != 0
    assert "expected the name of a new file" in again.stderr


def test_scores_of_a_split_are_those_of_the_report(run: Path, home: dict[str, str]) -> None:
    out = json.loads(of_command(home, "kd-eval", str(run), "--split", "test", "--json", cwd=run.parent))
    report = json.loads((run / "report.json").read_text())
    assert out["ndcg@10"] == pytest.approx(report["models"]["distilled"]["test"]["ndcg@10"]["mean"])


def st_embeddings(folder: Path, texts: tuple[str, ...]) -> Any:
    """Embed with sentence-transformers."""
    reason = "sentence-transformers is not installed (the extra dev)"
    made = pytest.importorskip("sentence_transformers", reason=reason).SentenceTransformer(str(folder), device="cpu")
    return made.encode(list(texts))


@pytest.mark.parametrize("format", ["safetensors", "sentence_transformers", "onnx"])
def test_exports_embed_alike(run: Path, home: dict[str, str], tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="the optional extra `export` is not installed")
    folder = tmp_path / format
    of_command(home, "kd-export", str(run), "--format", format, "--out", str(folder), cwd=tmp_path)
    parity = json.loads((folder / "export.json").read_text())["parity"]
    assert parity["cosine"] >= 0.9999
    assert parity["student"]["ndcg@10"] == pytest.approx(parity["export"]["ndcg@10"])
    low, high = parity["export_intervals"]["ndcg@10"]
    assert low < parity["export"]["ndcg@10"] < high
    ours = [[row["embedding"] for row in predicted(home, one, *TEXTS)] for one in (folder, run)]
    np.testing.assert_allclose(ours[0], ours[1], atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "student from pairs" in card
    if format == "sentence_transformers":
        np.testing.assert_allclose(st_embeddings(folder, TEXTS), ours[1], atol=1e-5)


def test_a_static_student_is_one_of_sentence_transformers_too(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    line = [one for one in overrides(run.parent) if not one.startswith(("student.", "model@"))]
    line += ["model@student=static_embedding", "data.dimensions=12", "stages=[distill]", f"run_dir={tmp_path / 'run'}"]
    of_command(home, "kd-train", *line, cwd=tmp_path)
    folder = tmp_path / "shipped"
    of_command(
        home,
        "kd-export",
        str(tmp_path / "run"),
        "--format",
        "sentence_transformers",
        "--out",
        str(folder),
        cwd=tmp_path,
    )
    ours = [row["embedding"] for row in predicted(home, folder, *TEXTS)]
    assert len(ours[0]) == 12
    np.testing.assert_allclose(ours, [row["embedding"] for row in predicted(home, tmp_path / "run", *TEXTS)], atol=1e-6)
    np.testing.assert_allclose(st_embeddings(folder, TEXTS[:2]), ours[:2], atol=1e-5)


def test_the_network_is_a_sentence_encoder(run: Path) -> None:
    model = load_run(run)
    assert isinstance(model.network, SentenceEncoder)
    assert model.task.description == f"embedding of {WIDTH}, also at 8"


def test_a_trained_teacher_is_as_wide_as_its_network(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    kept = (
        "stages=",
        "teacher.checkpoint",
        "data.dimensions",
        "model@",
        "student.",
        "+callbacks",
        "trainer.max_epochs",
    )
    line = [one for one in overrides(run.parent) if not one.startswith(kept)]
    line += [
        "stages=[teacher,distill]", "model@teacher.network=sentence_encoder", "data.dimensions=12",
        f"teacher.network.name={run.parent / 'teacher'}", "model@student=static_embedding", "trainer.max_epochs=1",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    of_command(home, "kd-train", *line, cwd=tmp_path)
    network: Any = load_stage(tmp_path / "run" / "teacher").network
    assert network.num_classes == WIDTH
    assert load_run(tmp_path / "run").task.outputs == 12


def test_other_losses_are_refused_in_one_line(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    line = [one for one in overrides(run.parent) if not one.startswith("distillation=")]
    ended = command(
        "kd-train", *line, "distillation=soft_target", f"run_dir={tmp_path / 'run'}", cwd=tmp_path, environment=home
    )
    assert ended.returncode != 0
    assert "distillation: labels are scores" in ended.stderr
    assert "distillation=embed_distill" in ended.stderr
    assert not (tmp_path / "run" / "seed_0").exists()


def test_margins_of_scored_pairs_are_refused_in_one_line(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    """There are none, and the student would be the baseline."""
    records = [{"query": q, "found": p, "like": n % 2} for n, (q, p) in enumerate(pairs())]
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, records)))
    line = [one for one in overrides(run.parent) if not one.startswith(("distillation=", "data.train_file"))]
    line += ["distillation=margin_mse", f"data.train_file={tmp_path / 'scored.jsonl'}", "data.score_column=like"]
    ended = command("kd-train", *line, f"run_dir={tmp_path / 'run'}", cwd=tmp_path, environment=home)
    assert ended.returncode != 0
    assert "distillation: kd finds nothing to compare in the training batches" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run" / "seed_0").exists()


def test_a_finished_student_is_a_start_for_embeddings_and_for_classes(run: Path) -> None:
    finished = load_run(run)
    weights = finished.network.state_dict()
    start = from_run(str(run), finished.task.outputs, embeds=True)
    assert all(tensor.equal(weights[name]) for name, tensor in start.state_dict().items())
    classifier = from_run(str(run), 3)
    kept = {name for name, tensor in classifier.state_dict().items() if name in weights and tensor.equal(weights[name])}
    assert {name for name in classifier.state_dict() if name.startswith("encoder.")} <= kept
    tokens = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    assert run_network(classifier, tokens).logits.shape == (2, 3)
