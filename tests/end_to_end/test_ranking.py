"""Rankings whole: one run, small and offline, a cross-encoder and a bi-encoder, and what is made of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from kd_lightning.data.text.tokens import encode_batch, load_tokenizer, write_tokenizer
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.training.run_folder import load_run
from tests.forks import command
from tests.toy_lists import lists, write_lists
from tests.toy_pairs import pairs

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = [
    "data=ranking_files", "data.document_column=documents", "data.grade_column=grades", "data.batch_size=8",
    "data.max_length=24", "distillation=listwise_kl", "teacher.precision=float32", "trainer.max_epochs=3",
    "trainer.precision=32-true", "optimizer.lr=0.003", "validations=2", "checkpoint_every_n_steps=5",
    "+callbacks.kill={_target_: tests.killer.KillAt, stage: distill}", "stages=[baseline,distill]",
]  # fmt: skip
BI_ENCODER = ["model@student=bi_encoder", "student.layers=1"]
CROSS_ENCODER = ["model@student=from_teacher", "student.layers=1"]
PAIRS = [(record["query"], text) for record in lists()[:3] for text in record["documents"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"KD_LIGHTNING_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}


def write_networks(folder: Path) -> None:
    """A cross-encoder and a sentence encoder as transformers writes them: random, with one tokenizer."""
    tokenizer = load_tokenizer("wordpiece:200", [text for pair in pairs() for text in pair])
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, num_labels=1, **SIZES)
    for name, kind in (("teacher", BertForSequenceClassification), ("encoder", BertModel)):
        kind(config).save_pretrained(folder / name)
        write_tokenizer(tokenizer, folder / name)


def overrides(folder: Path, student: list[str]) -> list[str]:
    named = [f"student.name={folder / 'encoder'}"] if student is BI_ENCODER else []
    given = [f"data.train_file={folder / 'queries.jsonl'}", f"teacher.checkpoint={folder / 'teacher'}"]
    return [*SMALL, *student, *named, *given]


def of_command(home: dict[str, str], *line: str, cwd: Path) -> str:
    ended = command(*line, cwd=cwd, environment=home)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data and the networks."""
    folder = tmp_path_factory.mktemp("ranking")
    write_lists(folder / "queries.jsonl")
    write_networks(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, home: dict[str, str]) -> Path:
    """A finished run of a bi-encoder."""
    out = of_command(home, "kd-train", *overrides(folder, BI_ENCODER), f"run_dir={folder / 'run'}", cwd=folder)
    (folder / "out.txt").write_text(out)
    return folder / "run"


@pytest.fixture(scope="module")
def cross(folder: Path, home: dict[str, str]) -> Path:
    """A finished run of a smaller cross-encoder."""
    line = [*overrides(folder, CROSS_ENCODER), "distillation=margin_mse_scores", "trainer.max_epochs=1"]
    of_command(home, "kd-train", *line, "stages=[distill]", f"run_dir={folder / 'cross'}", cwd=folder)
    return folder / "cross"


def test_the_report_compares_rankings(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["monitor"] == "mrr@10"
    assert report["data"]["unit"] == "query"
    assert report["data"]["units"] == 12
    assert set(report["models"]) == {"teacher", "baseline", "distilled"}
    for model in report["models"].values():
        assert {"mrr@10", "ndcg@10", "success@1", "spearman_to_teacher", "top_to_teacher"} <= set(model["test"])
        assert model["test"]["mrr@10"]["standard_error"] > 0
    assert report["models"]["teacher"]["test"]["spearman_to_teacher"]["mean"] == pytest.approx(1)
    difference = report["differences"]["distilled"]["baseline"]
    assert difference["paired"]
    assert difference["standard_error"] > 0
    text = (run / "report.md").read_text()
    for line in ("| MRR@10 |", "| nDCG@10 |", "student from grades", "over the 12 test queries"):
        assert line in text


def test_one_score_a_pair_is_cached(run: Path) -> None:
    out = (run.parent / "out.txt").read_text()
    assert "4 bytes an example" in out
    assert "240" in out


def test_a_killed_run_goes_on_to_the_same_weights(run: Path, home: dict[str, str]) -> None:
    line = ["kd-train", *overrides(run.parent, BI_ENCODER), f"run_dir={run.with_name('killed')}", "stages=[distill]"]
    killed = command(*line, cwd=run.parent, environment={**home, "KILL_AT_STEP": "8"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    of_command(home, *line, cwd=run.parent)
    whole, resumed = (
        load_file(one / "seed_0" / "distill" / "model.safetensors") for one in (run, run.with_name("killed"))
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def predicted(home: dict[str, str], model: Path, *given: str) -> list[dict[str, Any]]:
    out = of_command(home, "kd-predict", str(model), *given, "--json", cwd=model.parent)
    return [json.loads(line) for line in out.splitlines()]


def scores(home: dict[str, str], model: Path) -> list[float]:
    return [row["score"] for row in predicted(home, model, *("\t".join(pair) for pair in PAIRS))]


def test_predictions_are_scores_in_the_order_of_the_file(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    found = scores(home, run)
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in lists()[:3]))
    rows = predicted(home, run, "--file", str(path))
    assert [row["text"] for row in rows] == ["\t".join(pair) for pair in PAIRS]
    assert [row["score"] for row in rows] == pytest.approx(found)
    table = tmp_path / "more.csv"
    table.write_text("query,documents\n" + "".join(f"{query},{text}\n" for query, text in PAIRS))
    assert [row["score"] for row in predicted(home, run, "--file", str(table))] == pytest.approx(found)


def test_documents_can_be_embedded_beforehand(run: Path, home: dict[str, str]) -> None:
    model = load_run(run)
    network: Any = model.network
    assert isinstance(network, BiEncoder)
    assert model.tokenizer is not None
    parts = [
        run_network(network.network, encode_batch(model.tokenizer, [(pair[side],) for pair in PAIRS], 24)).logits
        for side in (0, 1)
    ]
    expected = 20 * nn.functional.cosine_similarity(*parts)
    assert expected.tolist() == pytest.approx(scores(home, run), abs=1e-4)


def test_scores_of_a_split_are_those_of_the_report(run: Path, home: dict[str, str]) -> None:
    out = json.loads(of_command(home, "kd-eval", str(run), "--split", "test", "--json", cwd=run.parent))
    report = json.loads((run / "report.json").read_text())
    assert out["mrr@10"] == pytest.approx(report["models"]["distilled"]["test"]["mrr@10"]["mean"])


def test_a_graded_file_is_scored(run: Path, home: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    rows = [(one["query"], text, grade) for one in lists()[:3]
            for text, grade in zip(one["documents"], one["grades"], strict=True)]  # fmt: skip
    more = [*rows, ("nothing to rank", "a document", 1)]
    path.write_text("query,text,grade\n" + "".join(f"{query},{text},{grade}\n" for query, text, grade in more))
    line = ["kd-eval", str(run), "--file", str(path), "--text-pair-column", "text", "--label-column", "grade"]
    done = command(*line, "--json", cwd=run.parent, environment=home)
    assert f"1 of 4 queries of {path} have nothing to rank, and do not count" in done.stderr
    out = json.loads(done.stdout)
    found, expected = scores(home, run), []
    for start in (0, 4, 8):
        relevant = next(i for i in range(start, start + 4) if rows[i][2])
        expected.append(1 / sum(found[i] >= found[relevant] for i in range(start, start + 4)))
    assert out["examples"] == 13
    assert out["mrr@10"] == pytest.approx(sum(expected) / 3)
    ended = command(*line[:-2], cwd=run.parent, environment=home)
    assert ended.returncode != 0
    assert "no column 'grades'" in ended.stderr
    assert "set --label-column" in ended.stderr


@pytest.mark.parametrize(
    ("which", "format"),
    [("run", "sentence_transformers"), ("run", "onnx"), ("cross", "huggingface"), ("cross", "safetensors")],
)
def test_exports_score_alike(
    which: str, format: str, request: pytest.FixtureRequest, home: dict[str, str], tmp_path: Path
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="the optional extra `export` is not installed")
    run, folder = request.getfixturevalue(which), tmp_path / format
    of_command(home, "kd-export", str(run), "--format", format, "--out", str(folder), cwd=tmp_path)
    parity = json.loads((folder / "export.json").read_text())["parity"]
    assert parity["student"]["mrr@10"] == pytest.approx(parity["export"]["mrr@10"])
    low, high = parity["export_intervals"]["mrr@10"]
    assert low <= parity["export"]["mrr@10"] <= high
    expected = scores(home, run)
    assert scores(home, folder) == pytest.approx(expected, abs=1e-4)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card
    reason = "sentence-transformers is not installed (the extra dev)"
    if format == "sentence_transformers":
        made = pytest.importorskip("sentence_transformers", reason=reason).SentenceTransformer(
            str(folder), device="cpu"
        )
        embedded = [torch.tensor(made.encode([pair[side] for pair in PAIRS])) for side in (0, 1)]
        theirs = 20 * nn.functional.cosine_similarity(*embedded)
        assert theirs.tolist() == pytest.approx(expected, abs=1e-4)
    if format == "huggingface":
        made = pytest.importorskip("sentence_transformers", reason=reason).CrossEncoder(str(folder), device="cpu")
        assert made.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_bi_encoder_without_layers_is_exported_too(folder: Path, home: dict[str, str], tmp_path: Path) -> None:
    line = [*overrides(folder, BI_ENCODER), "student.layers=0", "stages=[distill]", "trainer.max_epochs=1"]
    of_command(home, "kd-train", *line, "distillation=ranknet", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    out = tmp_path / "shipped"
    line = ["kd-export", str(tmp_path / "run"), "--format", "sentence_transformers", "--out", str(out)]
    of_command(home, *line, cwd=tmp_path)
    expected = scores(home, tmp_path / "run")
    assert len(set(expected)) > 1
    assert scores(home, out) == pytest.approx(expected, abs=1e-5)


def test_formats_that_do_not_fit_are_refused_in_one_line(
    run: Path, cross: Path, home: dict[str, str], tmp_path: Path
) -> None:
    for which, format, message in (
        (run, "huggingface", "this student embeds texts; use --format sentence_transformers"),
        (cross, "sentence_transformers", "BertForSequenceClassification is not made of its modules"),
    ):
        out = str(tmp_path / format)
        ended = command("kd-export", str(which), "--format", format, "--out", out, cwd=tmp_path, environment=home)
        assert ended.returncode != 0
        assert message in ended.stderr
        assert not Path(out).exists()


def test_losses_of_classes_are_refused_in_one_line(folder: Path, home: dict[str, str], tmp_path: Path) -> None:
    line = [one for one in overrides(folder, BI_ENCODER) if not one.startswith("distillation=")]
    ended = command(
        "kd-train", *line, "distillation=soft_target", f"run_dir={tmp_path / 'run'}", cwd=tmp_path, environment=home
    )
    assert ended.returncode != 0
    assert "distillation: labels are scores" in ended.stderr
    assert "distillation=listwise_kl" in ended.stderr
    assert not (tmp_path / "run" / "seed_0").exists()


def test_bad_input_is_one_line_with_its_place(folder: Path, home: dict[str, str], tmp_path: Path) -> None:
    records = lists()
    records[6]["documents"][2] = " "
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    line = [one for one in overrides(folder, BI_ENCODER) if not one.startswith("data.train_file")]
    for file, message in (
        (path, "broken.jsonl: line 7, column 'documents', text 3: the text is empty"),
        (folder / "queries.jsonl", "name data.document_column and data.grade_column, or data.positive_column"),
    ):
        more = [] if file == path else ["data.grade_column=null"]
        ended = command(
            "kd-train", *line, f"data.train_file={file}", *more, f"run_dir={tmp_path / 'run'}", cwd=tmp_path,
            environment=home,
        )  # fmt: skip
        assert ended.returncode != 0
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not (tmp_path / "run" / "seed_0").exists()
