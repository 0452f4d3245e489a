"""A teacher that has not learned is trained on, or said to be so, before students are trained."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import filelock
import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.pipeline import teacher_check
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.stages import Stage
from kd_lightning.pipeline.teacher_check import findings_of, is_pretrained, linear_accuracy, still_improving
from kd_lightning.tasks.scores import ScoreSpec
from kd_lightning.training.run_folder import best_training, read_stage, teacher_stage, trainings_of, validation_score
from tests.conftest import tiny_overrides

SHARE = ScoreSpec("accuracy", share=True)


@pytest.mark.parametrize(
    ("looks", "spec", "examples", "expected"),
    [
        ([0.5, 0.7, 0.8], SHARE, 100, True),
        ([0.5, 0.79, 0.8], SHARE, 100, False),  # the standard error is 0.04
        ([0.5, 0.79, 0.8], SHARE, 100_000, True),
        ([0.5, 0.9, 0.8], SHARE, 100, False),
        ([0.5, 0.9], SHARE, 100, False),  # too few looks
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.7], SHARE, 100, True),  # the last two of eight
        ([3.0, 2.0, 1.9], ScoreSpec("loss", "min"), 100, True),
        ([3.0, 2.0, 1.99], ScoreSpec("loss", "min"), 100, False),
    ],
)
def test_still_improving(looks: list[float], spec: ScoreSpec, examples: int, expected: bool) -> None:
    assert still_improving(looks, spec, examples) is expected


def test_a_linear_classifier_finds_what_is_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 8) * torch.tensor([1e3, *[1.0] * 7]) + 5
    labels = (x[:, 1:4] - 5).argmax(1)
    assert linear_accuracy((x[:400], labels[:400]), (x[400:], labels[400:]), 3) > 0.95
    assert linear_accuracy((x[:400], labels[:400]), (x[400:], labels[400:].roll(1)), 3) < 0.5


def test_which_networks_are_pretrained() -> None:
    assert is_pretrained({"_target_": "kd_lightning.models.hf.pretrained", "name": "minilm"})
    assert is_pretrained({"_target_": "kd_lightning.models.timm.timm_model", "pretrained": True})
    assert not is_pretrained({"_target_": "kd_lightning.models.timm.timm_model", "pretrained": False})


def made(composed: Callable[..., DictConfig], toy_csv: Path, folder: Path, *more: str) -> tuple[Run, StringIO]:
    said = StringIO()
    base = [*tiny_overrides(toy_csv, folder), "teacher.trainer.max_epochs=2", "teacher.validations=4"]
    return Run(composed(*base, "teacher.optimizer.lr=0.005", *more), Console(file=said, width=200)), said


def below(fraction: float) -> Callable[..., dict[str, float]]:
    return lambda run, stage: {"score": fraction, "train": 100, "validation": 10_000, "seconds": 1.0}


def test_a_teacher_below_a_linear_one_is_trained_on_from_its_weights(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_check, "_linear", below(1.0))
    monkeypatch.setattr(teacher_check, "by_budget", lambda trainer: True)
    run, said = made(composed, toy_csv, tmp_path / "run", "stages=[teacher,distill]")
    train_all(run)
    folder = tmp_path / "run" / "teacher"
    trained = trainings_of(folder)
    assert 2 <= len(trained) <= 3
    assert trained[1] == folder / "further_1"
    records = [read_stage(one) for one in trained]
    assert records[1]["steps"] == -(-records[0]["steps"] // 2)
    assert "start" in records[1]["settings"]
    assert best_training(folder) == max(trained, key=lambda one: validation_score(read_stage(one)))
    assert validation_score(records[-1]) >= validation_score(records[0])
    assert run.teacher.folder == best_training(folder) == teacher_stage(tmp_path / "run")
    assert "is trained on for" in said.getvalue()
    report = compare(run, "kd-train ...")
    assert any("trained on, its validation accuracy went" in line for line in report["warnings"])
    assert report["stages"]["teacher"] == pytest.approx(sum(record["seconds"] for record in records))
    lines = findings_of(folder)
    again, said = made(composed, toy_csv, tmp_path / "run", "stages=[teacher,distill]")
    train_all(again)
    assert said.getvalue().count("finished before") == len(trained) + 1
    assert findings_of(folder) == lines


def test_another_command_that_shares_the_teacher_waits_for_its_check(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = made(composed, toy_csv, tmp_path / "run", "stages=[teacher]")
    lock = filelock.FileLock(run.folder / "teacher" / ".lock")  # of its own, as another process has one
    checked: list[bool] = []

    def linear(run: Run, stage: Stage) -> None:
        with pytest.raises(filelock.Timeout):
            lock.acquire(timeout=0)
        checked.append(True)

    monkeypatch.setattr(teacher_check, "_linear", linear)
    train_all(run)
    assert checked == [True]
    lock.acquire(timeout=0)  # released at the end
    lock.release()


def test_where_the_user_gave_the_steps_it_is_only_said(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_check, "_linear", below(1.0))
    run, said = made(composed, toy_csv, tmp_path / "run", "stages=[teacher]")
    train_all(run)
    (line,) = findings_of(tmp_path / "run" / "teacher")
    assert "Train it for longer (teacher.trainer.max_epochs)" in line
    assert line in said.getvalue()
    assert trainings_of(tmp_path / "run" / "teacher") == [tmp_path / "run" / "teacher"]
