"""A run whose teacher is an ONNX file: it tags as any other teacher does."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.data import TokenFiles
from kd_lightning.data.text.tokens import write_tokenizer
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.runtime.errors import ConfigError, KDError
from tests.models.onnx_files import write_tagger
from tests.toy_tags import CITIES, NAMES, write_conll

Composed = Callable[..., DictConfig]
TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


@pytest.fixture
def checkpoint(tmp_path: Path, own_home: Path) -> Path:
    """A tagger that knows names and cities by heart, with its tokenizer and classes beside it."""
    write_conll(tmp_path / "train.conll")
    data = TokenFiles(str(tmp_path / "train.conll"), tokenizer="wordpiece:200", max_length=24, stride=8)
    data.prepare()
    tokenizer = data.student_tokenizer
    table = np.zeros((len(tokenizer), len(TAGS)), np.float32)
    table[:, 0] = 4.0
    for words, tag in ((NAMES, "B-PER"), ([city.split()[0] for city in CITIES], "B-LOC")):
        for word in words:
            table[tokenizer(word)["input_ids"][1], TAGS.index(tag)] = 8.0
    folder = tmp_path / "published"
    folder.mkdir()
    write_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(TAGS))}))
    return write_tagger(folder / "model.onnx", table)


def settings(tmp_path: Path, checkpoint: Path, *more: str) -> list[str]:
    return [
        "data=token_files", f"data.train_file={tmp_path / 'train.conll'}", "data.batch_size=16", "data.max_length=24",
        "data.stride=8", f"teacher.checkpoint={checkpoint}", "model@student=bilstm", "student.embedding_size=16",
        "student.hidden_size=16", "trainer.max_steps=150", "optimizer.lr=0.02", "validations=2",
        "stages=[baseline,distill]", f"run_dir={tmp_path / 'run'}", *more,
    ]  # fmt: skip


def run_of(cfg: DictConfig) -> Run:
    return Run(cfg, Console(file=StringIO(), width=200))


def test_it_teaches_and_is_reported(composed: Composed, tmp_path: Path, checkpoint: Path) -> None:
    run = run_of(composed(*settings(tmp_path, checkpoint)))
    assert run.cfg.teacher.precision == "float32"  # the graph has its own, whatever the machine
    train_all(run)
    report = compare(run, "kd-train ...")
    teacher, student = report["models"]["teacher"], report["models"]["distilled"]
    assert teacher["test"]["entity_f1"]["mean"] > 0.5  # of people with two names and New York it knows the first half
    assert teacher["size"]["parameters"] == len(run.data.student_tokenizer) * len(TAGS)  # type: ignore[attr-defined]
    assert teacher["size"]["bytes"] == pytest.approx(checkpoint.stat().st_size, abs=64)
    assert teacher["latency_ms"]["p50"] > 0
    assert student["test"]["agreement"]["mean"] > 0.8
    assert "kl_to_teacher" in student["test"]


def test_stored_outputs_are_the_running_ones_and_name_the_file(
    composed: Composed, tmp_path: Path, checkpoint: Path
) -> None:
    run = run_of(composed(*settings(tmp_path, checkpoint)))
    (folder,) = build_caches(run)
    provider = run.providers[0]
    stored = provider.teacher()
    running = provider.generator()  # type: ignore[union-attr]
    for batch in run.data.select(tokens="teacher").all_dataloader():
        keep = run.task.compared(batch)["keep"]
        assert torch.equal(stored(batch).logits[keep], running(batch).logits[keep])
    table = np.ones((len(run.data.student_tokenizer), len(TAGS)), np.float32)  # type: ignore[attr-defined]
    write_tagger(checkpoint, table)
    (other,) = build_caches(run_of(composed(*settings(tmp_path, checkpoint))))
    assert other != folder  # another file, another teacher


def test_a_file_without_a_description_has_the_datas_classes(
    composed: Composed, tmp_path: Path, checkpoint: Path
) -> None:
    (checkpoint.parent / "config.json").unlink()
    run = run_of(composed(*settings(tmp_path, checkpoint)))
    (folder,) = build_caches(run)
    assert folder.is_dir()


def test_it_is_no_language_model(composed: Composed, tmp_path: Path, checkpoint: Path) -> None:
    texts = [{"text": f"one two three and {number} more of them"} for number in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    line = [
        "data=lm_text", f"data.train_file={tmp_path / 'texts.jsonl'}", f"teacher.checkpoint={checkpoint}",
        "data.block_size=8", "stages=[distill]", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="an ONNX file teaches classifiers, taggers and regressions"):
        train_all(run_of(composed(*line)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["teacher.precision=bf16"], "onnxruntime runs it as it is, on the CPU; leave out teacher.precision=bf16"),
        (["teacher.compile=true", "teacher.features=[pooled]"], "leave out teacher.features, teacher.compile"),
        (["model@student=from_teacher", "student.layers=1"], "which a server or an ONNX file does not give"),
        (["distillation=hint_hidden"], "hidden"),
        (["teacher.checkpoint=gone.onnx"], "teacher.checkpoint=gone.onnx: there is no such file"),
        (["data.class_names=[O,B-PER,I-PER,B-LOC,I-LOC]"], "has the classes in the order ['O', 'B-LOC'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    more: list[str], message: str, composed: Composed, tmp_path: Path, checkpoint: Path
) -> None:
    replaced = {one.partition("=")[0] for one in more}
    base = [one for one in settings(tmp_path, checkpoint) if one.partition("=")[0] not in replaced]
    if "model@student" in replaced:
        base = [one for one in base if not one.startswith("student.")]
    with pytest.raises(ConfigError) as refused:
        train_all(run_of(composed(*base, *more)))
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_classes_beside_it_that_cannot_be_read_are_one_line(
    composed: Composed, tmp_path: Path, checkpoint: Path
) -> None:
    (checkpoint.parent / "config.json").unlink()
    (checkpoint.parent / "export.json").write_text('{"class_names": {"zero": "O"}}')
    with pytest.raises(KDError, match=r"export.json: expected numbered classes in class_names"):
        train_all(run_of(composed(*settings(tmp_path, checkpoint))))
