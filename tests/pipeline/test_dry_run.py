"""`kd train ... --dry-run`: what it says is what the run does, and it leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from kd_lightning.cli import train
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.dry_run import look_ahead, show
from kd_lightning.pipeline.estimate import _step_bytes
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError
from tests import forks
from tests.conftest import tiny_overrides

NOWHERE = ["data=text_files", "data.train_file=nowhere.csv"]
Composed = Callable[..., DictConfig]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tokens" not in path.parts}


def test_it_says_what_the_run_does_and_leaves_nothing(
    composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    overrides = [*tiny_overrides(toy_csv, tmp_path / "run"), "stages=[teacher,baseline,distill,finetune]"]
    before = files(tmp_path)
    outlook = look_ahead(Run(composed(*overrides), Console(quiet=True)))
    assert files(tmp_path) == before
    assert outlook.fates == ["trained"] * 4
    assert outlook.stored is None, "no teacher has predicted yet"
    assert outlook.clock is not None
    paths = [stage.path for stage in outlook.stages]
    assert outlook.clock.parts.keys() == {*paths, "report"}
    assert list(outlook.clock.memory) == paths

    train_all(Run(composed(*overrides, "stages=[teacher,baseline]"), Console(quiet=True)))
    before, output = files(tmp_path), StringIO()
    run = Run(composed(*overrides), Console(file=output, width=60))
    outlook = look_ahead(run)
    show(run, outlook)
    assert files(tmp_path) == before
    assert outlook.fates == ["reused", "reused", "trained", "trained"]
    assert list((outlook.stored or {}).values()) == [0]
    assert 0 < outlook.clock.outputs < outlook.clock.parts["seed_0/distill"]
    printed = output.getvalue().splitlines()
    assert [line.split()[0] for line in printed[1:5]] == ["teacher", "baseline,", "distill,", "finetune,"]
    assert f"0 of {run.data.num_examples} are stored in {own_home}" in output.getvalue()
    assert printed[-1] == f"a dry run: nothing was trained, nothing was written to {tmp_path / 'run'}"

    train_all(Run(composed(*overrides), Console(quiet=True)))
    outlook = look_ahead(Run(composed(*overrides, "seeds=2"), Console(quiet=True)))
    assert outlook.fates == ["reused"] * 4 + ["trained"] * 3
    assert list((outlook.stored or {}).values()) == [run.data.num_examples]
    assert outlook.clock is not None
    assert outlook.clock.outputs == 0
    with pytest.raises(ConfigError, match="holds a finished run with other settings"):
        look_ahead(Run(composed(*overrides, "temperature=3"), Console(quiet=True)))


def test_a_steps_memory_is_counted_by_hand() -> None:
    """A layer of 10 x 20 with Adam on 4 rows: weights, gradients, two moments and a step; the input is kept."""
    network = nn.Linear(10, 20)
    optimizer = torch.optim.Adam(network.parameters())
    trial: Any = SimpleNamespace(module=network)

    def step(batch: dict[str, torch.Tensor]) -> None:
        network(batch["x"]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = _step_bytes(trial, optimizer, step, {"x": torch.randn(4, 10)})
    weights, steps, kept = 4 * (10 * 20 + 20), 2 * 4, 4 * 4 * 10
    assert found == 4 * weights + steps + kept


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-m", "seed=1,2"], "kd-train: --dry-run is of one run, and -m makes several"),
        (["sweep=optuna"], "kd-train: --dry-run is of one run, and sweep=optuna makes several"),
        (["--multi", "seed=1,2"], "kd-train: --dry-run is of one run, and --multi makes several"),
        (["-rm", "seed=1,2"], "kd-train: --dry-run is of one run, and -rm makes several"),
        (["seed=1,2", "hydra.mode=MULTIRUN"], "--dry-run is of one run, and hydra.mode=MULTIRUN makes several"),
        (["--dry-run", *NOWHERE], "nowhere.csv: no such file"),
        (["temprature=3"], "kd-train: temprature: there is no such key"),
        (NOWHERE, "nowhere.csv: no such file"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = forks.command("kd-train", "--dry-run", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last", [[], ["--cfg", "job"]])
def test_a_users_own_file_starts_no_sweep(last: list[str], tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("defaults: [config, _self_]\nhydra: {mode: MULTIRUN}\n")
    (tmp_path / "here").mkdir()
    line = ["kd-train", "--config-dir", str(tmp_path / "conf"), "--config-name", "mine", "--dry-run", *NOWHERE, *last]
    result = forks.command(*line, cwd=tmp_path / "here")
    assert (result.returncode, "nowhere.csv: no such file" in result.stderr) == ((0, False) if last else (2, True))
    assert list((tmp_path / "here").iterdir()) == []


def test_a_point_of_a_sweep_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "in_sweep", lambda: True)
    with pytest.raises(SystemExit):
        train._look_ahead.__wrapped__(None)
    assert "this is a point of a sweep" in capsys.readouterr().err


def test_the_command_prints_and_leaves_nothing(toy_csv: Path, tmp_path: Path, own_home: Path) -> None:
    line = ["kd-train", *tiny_overrides(toy_csv, tmp_path / "run"), "--dry-run"]
    result = forks.command(*line, cwd=tmp_path, environment={"KD_LIGHTNING_HOME": str(own_home)})
    assert result.returncode == 0, result.stderr
    assert "seed_0/distill" in result.stdout
    assert not (tmp_path / "run").exists()
