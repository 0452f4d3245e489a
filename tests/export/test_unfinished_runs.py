"""Exports of a run that is still training."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.cli.export import main as kd_export
from kd_lightning.export.exported import read_exported
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from tests.conftest import tiny_overrides


class ExportsOthers(L.Callback):
    """Exports what a run has finished, once its second seed's distillation has begun."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        stage = Path(trainer.default_root_dir)
        if stage.parts[-2:] != ("seed_1", "distill"):
            return
        run, out = stage.parents[1], stage.parents[2]
        kd_export([str(run / "seed_0/distill"), "--format", "safetensors", "--out", str(out / "stage")])
        kd_export([str(run), "--seed", "0", "--format", "safetensors", "--out", str(out / "seed")])
        with pytest.raises(SystemExit) as refused:
            kd_export([str(run), "--format", "safetensors", "--out", str(out / "out")])
        (out / "said").write_text(str(refused.value))


def test_a_finished_seed_is_exported_while_another_trains(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    run = tmp_path / "run"
    cfg = composed(
        *tiny_overrides(toy_csv, run), "seeds=2", "stages=[teacher,distill]", "trainer.max_steps=4",
        "teacher.trainer.max_steps=4", f"+callbacks.export={{_target_: {__name__}.ExportsOthers}}",
    )  # fmt: skip
    train_all(Run(cfg, Console(file=StringIO())))
    for name in ("stage", "seed"):
        assert "distilled" in (tmp_path / name / "README.md").read_text(encoding="utf-8")
        exported = read_exported(tmp_path / name)
        assert Path(exported.run, exported.stage) == run / "seed_0/distill"
    assert not (tmp_path / "out").exists()
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert f"{run} is unfinished (seed_1/distill has begun): run the same kd-train again to resume it" in said
    assert f"or name a finished one explicitly: {run / 'seed_0/distill'}" in said
    kd_export([str(run), "--format", "safetensors", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out").is_dir()
