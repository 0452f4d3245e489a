"""`kd-cli` and `kd-config` as people type them: offline and small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kd_lightning.cli import export_config
from kd_lightning.cli.lightning import main, parser, partially
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.optim import warmup_linear
from kd_lightning.training.run_folder import load_run
from tests import ROOT, forks
from tests.conftest import tiny_overrides, write_toy_csv

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
TASK = {"class_path": "kd_lightning.tasks.Classification", "init_args": {"classes": 3}}
LSTM: dict[str, Any] = {
    "class_path": "kd_lightning.models.bilstm.BiLSTM",
    "init_args": {"num_classes": 3, "vocab_size": 200, "embedding_size": 8, "hidden_size": 8},
}


class Own(L.Trainer):
    """A trainer that `kd-cli` cannot be told to use."""


def by_hand(folder: Path) -> dict[str, Any]:
    """A file as a person writes it: a running teacher, hidden states to learn from, no callback of ours."""
    hint = {"class_path": "kd_lightning.losses.hint.HintLoss", "init_args": {"projector": "linear"}}
    student = {**LSTM, "init_args": {**LSTM["init_args"], "hidden_size": 6}}
    objective = {
        "class_path": "kd_lightning.Objective",
        "init_args": {
            "terms": {
                "ce": {"class_path": "kd_lightning.losses.CrossEntropyLoss"},
                "kd": {"class_path": "kd_lightning.losses.SoftTargetLoss", "init_args": {"temperature": 2.0}},
                "hint": hint,
            },
            "weights": {"ce": 0.5, "kd": 0.5, "hint": 1.0},
        },
    }
    teacher = {
        "class_path": "kd_lightning.teachers.FrozenTeacher", "init_args": {"network": LSTM, "features": ["pooled"]}
    }  # fmt: skip
    return {
        "seed_everything": 3,
        "model": {
            "class_path": "kd_lightning.DistillationModule",
            "init_args": {
                "student": student, "teacher": teacher, "objective": objective, "task": TASK,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "scheduler": "kd_lightning.training.optim.warmup_linear",
            },
        },
        "data": {
            "class_path": "kd_lightning.data.TextFiles",
            "init_args": {"train_file": str(folder / "toy.csv"), "tokenizer": "wordpiece:400", "batch_size": 16},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(folder / "out")},
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, own_home: Path) -> Path:
    write_toy_csv(tmp_path / "toy.csv", rows=120)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(by_hand(tmp_path)))
    return path


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that the parser must refuse with exit code 2; return what it says of the mistake."""
    monkeypatch.setattr(sys, "argv", ["kd-cli", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said[said.index("error:") :]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model.init_args.temperatur=3"], ["temperatur"]),
        (["--trainer.epochs=3"], ["trainer.epochs"]),
        (["--nothing=3"], ["nothing"]),
        (["--trainer.max_epochs=many"], ["trainer.max_epochs", "many"]),
        (["--model.init_args.task.init_args.classes=three"], ["classes", "three"]),
        (["--data.init_args.max_length=long"], ["max_length", "long"]),
        (["--model.init_args.optimizer.init_args.lr=fast"], ["lr", "fast"]),
        (
            ["--model=kd_lightning.training.distillation.Distillation"],
            ["kd_lightning.training.distillation.Distillation"],
        ),
        (["--model=kd_lightning.models.bilstm.BiLSTM"], ["BiLSTM", "LightningModule"]),
        (["--data=kd_lightning.data.Review"], ["kd_lightning.data.Review"]),
        (["--model.init_args.teacher=torch.nn.Linear"], ["torch.nn.Linear", "Teacher"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_refused_with_its_key(
    file: Path, arguments: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = refused(monkeypatch, capsys, "fit", "--config", str(file), *arguments)
    for text in says:
        assert text in said
    assert not (file.parent / "out").exists()


def test_the_configuration_is_printed_and_can_be_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kd-cli", "fit", "--config", str(file), "--data.batch_size=7", "--print_config"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    printed = capsys.readouterr().out
    content = yaml.safe_load(printed)
    assert content["data"]["init_args"]["batch_size"] == 7
    assert content["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert content["model"]["init_args"]["student"]["init_args"]["dropout"] == 0.3, "defaults are filled in"
    content = {key: content[key] for key in ("seed_everything", "model", "data", "trainer")}
    again = parser().instantiate_classes(parser().parse_object(content))
    assert isinstance(again.model, DistillationModule)
    assert again.data.batch_size == 7


def test_a_file_written_by_hand_trains_and_its_checkpoint_is_scored_elsewhere(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has projectors, which a test does not build; and it has no teacher."""
    saved = tmp_path / "student.ckpt"

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["kd-cli", *arguments, *QUIET])
        main()

    best = [
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.filename=student",
    ]  # fmt: skip
    run("fit", "--config", str(file), *best)
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert any(name.startswith("objective.terms.hint") for name in state)
    assert {name.partition(".")[0] for name in state} <= {"student", "objective"}
    predictions = tmp_path / "said.jsonl"
    writer = ["--trainer.callbacks=kd_lightning.callbacks.PredictionWriter", f"--trainer.callbacks.file={predictions}"]
    for command in ("validate", "test"):
        run(command, "--config", str(file), "--ckpt_path", str(saved))
    run("predict", "--config", str(file), "--ckpt_path", str(saved), *writer)
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 24  # a fifth of 120
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert all(sum(row["prediction"]) == pytest.approx(1, abs=1e-5) for row in rows)
    network = BiLSTM(3, 200, embedding_size=8, hidden_size=6)
    network.load_state_dict({n.removeprefix("student."): v for n, v in state.items() if n.startswith("student.")})


def test_a_teacher_that_does_not_exist_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(file.read_text())
    content["model"]["init_args"]["teacher"] = {
        "class_path": "kd_lightning.pipeline.checkpoint_teacher.FinishedTeacher",
        "init_args": {"checkpoint": "./nowhere"},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["kd-cli", "fit", "--config", str(file), *QUIET])
    with pytest.raises(SystemExit) as left:
        main()
    assert str(left.value).startswith("kd-cli: ")
    assert "./nowhere" in str(left.value)


def test_a_checkpoint_that_does_not_exist_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["test", "--config", str(file), "--ckpt_path", "nowhere.ckpt", *QUIET]
    monkeypatch.setattr(sys, "argv", ["kd-cli", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert str(left.value) == "kd-cli: Checkpoint file not found: nowhere.ckpt"


def test_a_teacher_that_does_not_give_what_is_read_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(file.read_text())
    del content["model"]["init_args"]["teacher"]["init_args"]["features"]
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["kd-cli", "fit", "--config", str(file), *QUIET])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert str(left.value) == "kd-cli: the objective reads the teacher's pooled: give the teacher features=['pooled']"


def test_a_function_with_arguments_is_checked() -> None:
    made = partially("kd_lightning.training.optim.warmup_linear", {"warmup": 0.5})
    assert (made.func, made.keywords) == (warmup_linear, {"warmup": 0.5})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="takes no 'warmups'; did you mean 'warmup'"):
        partially("kd_lightning.training.optim.warmup_linear", {"warmups": 0.5})
    with pytest.raises(ConfigError, match="warmup='long' is not a number"):
        partially("kd_lightning.training.optim.warmup_linear", {"warmup": "long"})


# -- kd-config, and the commands themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["temperatur=3"], "temperatur: there is no such key; did you mean 'temperature'"),
        (["distillation=regresion"], "distillation=regresion: there is no such choice; did you mean 'regression'?"),
        (["optimizer.lr=fast"], "optimizer.lr='fast' is not a number"),
        (["trainer._target_=tests.cli.test_lightning.Own"], "trainer: kd-cli uses lightning.Trainer, not tests"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    overrides: list[str], says: str, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["kd-config", *small, *overrides, "--to-cli", str(tmp_path / "files")])
    with pytest.raises(SystemExit) as left:
        export_config.main()
    assert left.value.code == 2
    assert says in str(left.value)
    assert not (tmp_path / "files").exists()


def kd(name: str, *arguments: str, home: Path) -> str:
    environment = {"KD_LIGHTNING_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = forks.command(name, *arguments, cwd=home.parent, environment=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def started(module: str, *arguments: str, home: Path) -> str:
    """Run a command in a process of its own, which may start others."""
    environment = {**os.environ, "KD_LIGHTNING_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-m", f"kd_lightning.{module}", *arguments], env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", ["cli.lightning", "cli.export_config"])
def test_help_is_quick_and_has_examples(module: str, tmp_path: Path) -> None:
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"kd_lightning.{module}", "--help"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert "kd-cli fit --config" in listing.stdout
    assert not {line.rsplit("|", 1)[-1].strip() for line in listing.stderr.splitlines()} & {"torch", "lightning"}


@pytest.mark.slow
def test_fit_validate_test_and_predict_from_files_that_kd_config_wrote(tmp_path: Path) -> None:
    home, files = tmp_path / "home", tmp_path / "files"
    small = tiny_overrides(write_toy_csv(tmp_path / "toy.csv", rows=120), tmp_path / "run")
    commands = kd("kd-config", *small, "seeds=1", "--to-cli", str(files), home=home).splitlines()
    assert commands == [f"kd-cli fit --config {files / name}.yaml" for name in
                        ("teacher", "seed_0/baseline", "seed_0/distill")]  # fmt: skip
    for command in commands:
        kd("kd-cli", *command.split()[1:], *QUIET[:2], home=home)
    stage = tmp_path / "run" / "seed_0" / "distill"
    chosen = ["--config", str(files / "seed_0/distill.yaml"), "--ckpt_path", str(stage / "lightning/best.ckpt")]
    record = json.loads((stage / "stage.json").read_text())
    assert f"{record['validation']['accuracy']:.4f}"[:5] in kd("kd-cli", "validate", *chosen, *QUIET[:2], home=home)
    said = kd("kd-cli", "test", *chosen, *QUIET[:2], home=home)
    assert "test/accuracy" in said
    kd("kd-cli", "predict", *chosen, *QUIET[:2], home=home)
    rows = [json.loads(line) for line in (stage / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    scored = json.loads(kd("kd-eval", str(stage), "--file", str(tmp_path / "toy.csv"), "--json", home=home))
    assert scored["examples"] == 120
    assert load_run(tmp_path / "run").folder == stage

    again = subprocess.run(
        [sys.executable, "-m", "kd_lightning.cli.lightning", "fit", "--config", str(files / "teacher.yaml")],
        env={**os.environ, "KD_LIGHTNING_HOME": str(home)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith(f"kd-cli: {tmp_path / 'run/teacher'} holds a finished training")


@pytest.mark.slow
def test_two_processes_train_as_those_of_kd_train(tmp_path: Path) -> None:
    """Whose processes are spawned, where `kd-cli` is started again for each."""
    small = [*tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path / "run"), "trainer=ddp"]
    small += ["trainer.max_epochs=2", "stages=[teacher,distill]"]
    for command in started(
        "cli.export_config", *small, "--to-cli", str(tmp_path / "files"), home=tmp_path / "home"
    ).splitlines():
        started("cli.lightning", *command.split()[1:], *QUIET[:2], home=tmp_path / "home")
    stage = tmp_path / "run" / "seed_0" / "distill"
    chosen = [
        "--config",
        str(tmp_path / "files/seed_0/distill.yaml"),
        "--ckpt_path",
        str(stage / "lightning/best.ckpt"),
    ]
    started("cli.lightning", "predict", *chosen, *QUIET[:2], home=tmp_path / "home")
    rows = [json.loads(line)["index"] for line in (stage / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == len(set(rows)) == 48, "what each of the two said"
    started("cli.train", *small, f"run_dir={tmp_path / 'whole'}", home=tmp_path / "other home")
    for stage in ("teacher", "seed_0/distill"):
        one, other = (load_file(tmp_path / run / stage / "model.safetensors") for run in ("run", "whole"))
        assert all(torch.equal(value, other[name]) for name, value in one.items()), stage
