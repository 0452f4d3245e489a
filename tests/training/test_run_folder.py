from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.cli import evaluate, predict
from kd_lightning.data import TextFiles
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import write_file
from kd_lightning.runtime.fingerprints import differences, digest, network_digest
from kd_lightning.runtime.seals import write_sealed
from kd_lightning.training.run_folder import (
    check_fingerprint,
    find_stage,
    finish_stage,
    load_run,
    read_stage,
    save_network,
)
from kd_lightning.training.stage import planned_steps
from tests.whole_split import text_logits


class Mine(nn.Module):
    """A user's network: rebuilt from its class and arguments."""

    def __init__(self, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocab_size, num_classes)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.bag(input_ids)


@pytest.fixture
def data(toy_csv: Path, own_home: Path) -> TextFiles:
    data = TextFiles(str(toy_csv), tokenizer="wordpiece:300")
    data.prepare()
    return data


def save(folder: Path, data: TextFiles, network: nn.Module, accuracy: float = 0.5, **settings: object) -> None:
    task = {"class_names": data.class_names, "max_length": 16, "texts": 1, "role": "student"}
    save_network(folder, network, dict(settings), task, data.student_tokenizer)
    scores = {"validation": {"accuracy": accuracy}, "monitor": "accuracy", "mode": "max"}
    finish_stage(folder, {"fingerprint": "f", "settings": {}, **scores})


@pytest.fixture
def run(tmp_path: Path, data: TextFiles) -> Path:
    torch.manual_seed(0)
    for seed, accuracy in ((0, 0.7), (1, 0.9), (2, 0.8)):
        network = BiLSTM(**data.model_arguments("student"), embedding_size=4, hidden_size=4)
        save(tmp_path / "run" / f"seed_{seed}" / "distill", data, network, accuracy)
    return tmp_path / "run"


def test_a_network_is_read_back_with_its_weights_and_predicts_alike(run: Path, data: TextFiles) -> None:
    model = load_run(run, seed=0)
    again = load_run(run / "seed_0" / "distill")
    assert network_digest(model.network) == network_digest(again.network)
    assert model.class_names == ["food", "science", "运动"]
    assert not model.network.training
    texts = [("good soup",), ("球赛, a match today",), ("atom",)]
    together = text_logits(model, texts)
    for i, text in enumerate(texts):
        batch = data.encode([text[0]])
        torch.testing.assert_close(run_network(model.network, batch).logits[0], together[i])


def test_the_student_that_is_best_on_validation_is_taken(run: Path, data: TextFiles) -> None:
    assert find_stage(run) == run / "seed_1" / "distill"
    assert find_stage(run, seed=2) == run / "seed_2" / "distill"
    network = BiLSTM(**data.model_arguments("student"), embedding_size=4, hidden_size=4)
    save(run / "seed_0" / "baseline", data, network, accuracy=0.99)
    save(run / "seed_2" / "finetune", data, network, accuracy=0.5)
    assert find_stage(run) == run / "seed_1" / "distill", "not the baseline, nor what fine-tuning made worse"
    save(run / "seed_0" / "finetune", data, network, accuracy=0.95)
    assert find_stage(run) == run / "seed_0" / "finetune"
    with pytest.raises(KDError, match="no finished student of seed 7"):
        find_stage(run, seed=7)


def test_the_student_with_the_least_of_a_loss_is_taken(run: Path) -> None:
    for seed, loss in ((0, 2.0), (1, 3.0), (2, 1.0)):
        stage = run / f"seed_{seed}" / "distill"
        finish_stage(stage, read_stage(stage) | {"validation": {"loss": loss}, "monitor": "loss", "mode": "min"})
    assert load_run(run).folder == run / "seed_2" / "distill"
    finish_stage(stage, {"validation": {"loss": 1.0}})
    with pytest.raises(KDError, match=r"stage\.json is of an older version"):
        load_run(run)


def test_a_users_network_is_rebuilt_from_its_settings(tmp_path: Path, data: TextFiles) -> None:
    settings = {"_target_": "tests.training.test_run_folder.Mine", "vocab_size": 300, "num_classes": 3}
    network = Mine(300, 3)
    save(tmp_path / "mine", data, network, **settings)
    assert network_digest(load_run(tmp_path / "mine", trust=True).network) == network_digest(network)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    settings = {"optimizer": {"lr": 0.1}, "steps": 5}
    assert check_fingerprint(tmp_path, digest(settings), settings) is False
    write_sealed(tmp_path / "settings.json", {"fingerprint": digest(settings), "settings": settings})
    assert check_fingerprint(tmp_path, digest(settings), settings) is False
    other = {"optimizer": {"lr": 0.2}, "steps": 5}
    with pytest.raises(ConfigError, match=r"begun training with other settings \(optimizer.lr was 0.1, now 0.2\)"):
        check_fingerprint(tmp_path, digest(other), other)
    finish_stage(tmp_path, {"fingerprint": digest(settings), "settings": settings})
    assert check_fingerprint(tmp_path, digest(settings), settings) is True


def test_of_two_fingerprints_it_is_said_that_they_differ() -> None:
    old, new = {"data": "0" * 64, "seed": 1, "start": None}, {"data": "f" * 64, "seed": 2, "start": "0" * 16}
    found = differences(old, new)
    assert sorted(found) == ["data changed", "seed was 1, now 2", f"start was None, now {'0' * 16}"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a.txt", "old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_file(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_eval_scores_another_file(run: Path, toy_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([str(run), "--file", str(toy_csv), "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["examples"] == 240
    assert 0.0 <= scores["accuracy"] <= 1.0
    model = load_run(run)
    texts = ["soup, bread", "lab theory"]
    right = [model.class_names[i] for i in text_logits(model, [(text,) for text in texts]).argmax(1).tolist()]
    (tmp_path / "right.csv").write_text(
        "text,label\n" + "".join(f'"{t}",{n}\n' for t, n in zip(texts, right, strict=True))
    )
    evaluate.main([str(run), "--file", str(tmp_path / "right.csv"), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\nsoup,foot\n", "line 2, column 'label': unknown label 'foot'; did you mean 'food'"),
        ("sentence,label\nsoup,food\n", "text"),
    ],
)
def test_eval_of_a_bad_file_is_one_line(run: Path, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(SystemExit, match=r"^kd-eval: ") as refused:
        evaluate.main([str(run), "--file", str(tmp_path / "bad.csv")])
    assert says in str(refused.value)


def test_predict_reads_a_file_and_prints_a_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("good soup\n\nan atom\n", encoding="utf-8")
    predict.main([str(run), "--file", str(tmp_path / "texts.txt")])
    printed = capsys.readouterr().out
    assert "good soup" in printed
    assert "p(science)" in printed
    predict.main([str(run), "good soup", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert sum(row["probabilities"].values()) == pytest.approx(1.0)
    assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)


@pytest.mark.parametrize(
    ("trainer", "batches", "steps"),
    [
        ({"max_steps": 7, "max_epochs": 3}, 10, 7),
        ({"max_steps": -1, "max_epochs": 3}, 10, 30),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 10, 9),
        ({"max_epochs": "auto"}, 10, 7),
        ({"max_epochs": "auto", "accumulate_grad_batches": 2, "devices": 2}, 10, 2),
    ],
)
def test_planned_steps_are_those_the_trainer_takes(trainer: dict[str, Any], batches: int, steps: int) -> None:
    assert planned_steps(trainer, labelled=16 * batches - 5, batch_size=16, examples=100) == steps
