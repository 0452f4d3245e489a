"""What links in a run's folder lead to is neither written nor removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from kd_lightning.cli.evaluate import main as kd_eval
from kd_lightning.cli.export import main as kd_export
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.links import check_links
from tests.conftest import tiny_overrides

Composed = Callable[..., DictConfig]
PLACES = (
    ".lock", "slurm", "tasks", "tasks/domain", "seed_0", "teacher", "teacher_1", "assistant_1", "seed_0/distill",
    "seed_0/baseline", "teacher/checkpoints", "teacher/.lock", "seed_0/distill/checkpoints", "seed_0/distill/csv",
    "seed_0/distill/csv/version_0", "seed_0/distill/csv/version_0/metrics.csv", "seed_0/distill/tokenizer",
    "seed_0/distill/checkpoints/best.ckpt", "seed_0/distill/diverged",
)  # fmt: skip


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("kept.txt", "best.ckpt", "resume.ckpt", "metrics.csv", ".kept.0.1@here.tmp", "heatmap.png"):
        (folder / name).write_text("the user's own")
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", PLACES)
def test_links_are_refused(inside: str, victim: Path, tmp_path: Path) -> None:
    link, before = tmp_path / "run" / inside, listing(victim)
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / "kept.txt" if "." in link.name else victim)
    for shared in (None, str(tmp_path / "shared")):
        with pytest.raises(ConfigError, match=r"is a link: .* put a folder") as refused:
            check_links(tmp_path / "run", shared)
        assert str(link) in str(refused.value)
    assert listing(victim) == before


def test_a_training_refuses_them(
    victim: Path, composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "seed_0").symlink_to(victim)
    before = listing(victim)
    with pytest.raises(ConfigError, match=r"run/seed_0 is a link: .* put a folder"):
        Run(composed(*tiny_overrides(toy_csv, tmp_path / "run")))
    assert listing(victim) == before


def test_points_of_a_sweep_share_by_links_and_a_run_may_be_one(tmp_path: Path) -> None:
    teacher, run = tmp_path / "shared" / "teacher-0123", tmp_path / "disk" / "run"
    (teacher / "checkpoints").mkdir(parents=True)
    (run / "seed_0").mkdir(parents=True)
    (tmp_path / "run").symlink_to(run)
    (run / "teacher").symlink_to(os.path.relpath(teacher, run))
    (run / "seed_0" / "baseline").symlink_to(teacher)
    check_links(tmp_path / "run", str(tmp_path / "shared"))
    for shared in (None, str(tmp_path / "other")):
        with pytest.raises(ConfigError, match="teacher is a link"):
            check_links(run, shared)
    (teacher / "csv").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="csv is a link"):
        check_links(run, str(tmp_path / "shared"))


def test_reading_through_a_link_writes_nothing(
    victim: Path, composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    overrides = tiny_overrides(toy_csv, tmp_path / "run")
    train_all(Run(composed(*overrides, "stages=[teacher,distill]", "teacher.trainer.max_epochs=1")))
    for inside in ("teacher", "seed_0"):
        shutil.move(tmp_path / "run" / inside, victim / inside)
        (tmp_path / "run" / inside).symlink_to(victim / inside)
    before = listing(victim)
    kd_eval([str(tmp_path / "run")])
    kd_export([str(tmp_path / "run"), "--format", "safetensors", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="is a link"):
        Run(composed(*overrides))
    assert listing(victim) == before
    capsys.readouterr()
