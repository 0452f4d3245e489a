"""Paths of data outlive a change of the working directory, and a move of the run together with its data."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from kd_lightning.data.sources.places import absolute, found
from kd_lightning.export.source import run_data
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from tests.conftest import tiny_overrides, write_toy_csv


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files, some of which are called as a column or a class is."""
    for name in ("my.csv", "more.txt", "text", "pos", "amazon"):
        (tmp_path / name).write_text("x")
    for name in ("images", "saved", "minilm"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_a_path_becomes_absolute_and_nothing_else(there: Path) -> None:
    settings = {
        "_target_": "kd_lightning.data.TextFiles", "train_file": "my.csv", "test_file": None, "text_column": "text",
        "class_names": ["pos", "neg"], "transfer": ["more.txt", "amazon", "hf:saved:plain", "hf:imdb"],
        "tokenizer": "minilm", "teacher_tokenizer": "saved", "cache_dir": "tokens", "validation_file": "gone.csv",
        "name": "imdb", "tasks": {"one": {"folder": "./images", "train_file": str(there / "my.csv")}}, "views": 4,
    }  # fmt: skip
    assert absolute(settings) == settings | {
        "train_file": str(there / "my.csv"), "teacher_tokenizer": str(there / "saved"),
        "transfer": [str(there / "more.txt"), "amazon", f"hf:{there / 'saved'}:plain", "hf:imdb"],
        "cache_dir": str(there / "tokens"),
        "tasks": {"one": {"folder": str(there / "images"), "train_file": str(there / "my.csv")}},
    }  # fmt: skip
    assert absolute(absolute(settings)) == absolute(settings)


def test_the_home_folder_is_written_out(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(there))
    assert absolute({"train_file": "~/my.csv"}) == {"train_file": str(there / "my.csv")}


def test_moved_data_are_found_beside_the_run(tmp_path: Path) -> None:
    new = tmp_path / "new" / "place"
    (new / "data").mkdir(parents=True)
    (new / "data" / "my.csv").write_text("x")
    gone = "/nowhere/project/data/my.csv"
    was, now = Path("/nowhere/project/runs/mine"), new / "runs" / "mine"
    assert found({"train_file": gone}, was, now) == {"train_file": str(new / "data" / "my.csv")}
    assert found({"train_file": "/nowhere/other.csv"}, was, now) == {"train_file": "/nowhere/other.csv"}
    (tmp_path / "still.csv").write_text("x")
    assert found({"train_file": str(tmp_path / "still.csv")}, was, now) == {"train_file": str(tmp_path / "still.csv")}


def test_a_runs_data_are_found_from_another_directory_and_after_a_move(
    composed: Callable[..., DictConfig], own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_toy_csv(tmp_path / "toy.csv", 60)
    overrides = tiny_overrides(Path("toy.csv"), Path("runs/mine"))
    train_all(Run(composed(*overrides, "stages=[baseline]", "trainer.max_epochs=1"), Console(file=StringIO())))
    cfg = OmegaConf.load(tmp_path / "runs/mine/config.yaml")
    assert cfg.data.train_file == str(tmp_path / "toy.csv")
    assert cfg.run_dir == str(tmp_path / "runs/mine")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    stage = Path("seed_0/baseline")
    expected = run_data(tmp_path / "runs/mine" / stage).fingerprint
    (tmp_path / "new").mkdir()
    for name in ("runs", "toy.csv"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    assert run_data(tmp_path / "new/runs/mine" / stage).fingerprint == expected
