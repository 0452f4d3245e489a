"""A training whose numbers end is ended, says why, loses nothing, and lets other settings begin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from kd_lightning.losses import SoftTargetLoss
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError, Diverged
from kd_lightning.training.callbacks import Divergence
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.types import Batch, ModelOutput
from tests import ROOT
from tests.config.test_catalog import Data, examples_of, made
from tests.conftest import tiny_overrides
from tests.end_to_end.test_precision import overflowing
from tests.ranks import scaled


class Poison(L.Callback):
    """Multiplies the loss, or a weight's gradient, of one step (of all from it on)."""

    def __init__(self, step: int, factor: float = float("nan"), gradient: bool = False, once: bool = True) -> None:
        self.step, self.factor, self.gradient, self.once = step, factor, gradient, once

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        here = trainer.global_step == self.step if self.once else trainer.global_step >= self.step
        step, factor = type(pl_module).training_step, self.factor
        if here and not self.gradient:
            pl_module.training_step = lambda batch, batch_idx: step(pl_module, batch, batch_idx) * factor
        elif here:
            pl_module.training_step = lambda batch, batch_idx: (
                step(pl_module, batch, batch_idx) + _Hidden.apply(next(iter(pl_module.parameters())))
            )
        else:
            pl_module.__dict__.pop("training_step", None)


class _Hidden(torch.autograd.Function):
    """Zero, with a gradient that is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream.new_full(ctx.shape, float("nan"))


def fit(module: L.LightningModule, data: Any, folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=20, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[Divergence(folder, "distill, seed 0"), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    "poison", [Poison(7), Poison(7, float("inf")), Poison(7, gradient=True)], ids=["nan", "inf", "gradient"]
)
def test_it_ends_with_its_last_good_weights(
    poison: Poison, clip: float | None, tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    module, data = made("soft_target", "text", composed)
    with pytest.raises(
        Diverged, match=r"distill, seed 0 diverged at step 7: the (loss|gradient's norm) is .*optimizer\.lr"
    ):
        fit(module, data, tmp_path, poison, gradient_clip_val=clip)
    kept = tmp_path / "diverged"
    assert {path.name for path in kept.iterdir()} == {"batch.safetensors", "weights.safetensors", "why.json"}
    weights = load_file(kept / "weights.safetensors")
    assert all(x.isfinite().all() for x in weights.values())
    assert torch.equal(load_file(kept / "batch.safetensors")["index"], data.batches[1]["index"])
    assert json.loads((kept / "why.json").read_text())["step"] == 7


def test_where_losses_are_looked_at_now_and_then_it_ends_within_ten_steps(
    tmp_path: Path, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr(Divergence, "_at_once", lambda self, trainer: False)
    module, data = made("soft_target", "text", composed)
    with pytest.raises(Diverged, match="diverged at step 10: the loss of 3 steps was not finite"):
        fit(module, data, tmp_path, Poison(7, once=False), limit_val_batches=0)
    assert not (tmp_path / "diverged" / "weights.safetensors").exists(), "they are no numbers either"


def test_one_bad_loss_is_remembered_until_the_next_look(
    tmp_path: Path, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Divergence, "_at_once", lambda self, trainer: False)
    module, data = made("soft_target", "text", composed)
    with pytest.raises(Diverged, match="the loss of 2 steps"):
        fit(module, data, tmp_path, Poison(13, once=True), max_steps=15, limit_val_batches=0)


def test_steps_that_a_scaler_leaves_out_are_none(tmp_path: Path) -> None:
    module, data = overflowing(100.0)
    fit(module, data, tmp_path, plugins=[scaled(2.0**16)])
    assert module.skipped_steps > 0
    assert not (tmp_path / "diverged").exists()


def test_losses_that_stay_no_numbers_end_it_under_a_scaler_too(tmp_path: Path) -> None:
    module, data = overflowing(100.0)
    with pytest.raises(Diverged, match=r"of 17 steps .*16 bits may be too narrow: set trainer\.precision=bf16-mixed"):
        fit(module, data, tmp_path, Poison(3, once=False), plugins=[scaled(2.0)])


def test_a_validation_loss_that_is_no_number_ends_it(
    tmp_path: Path, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = made("soft_target", "text", composed)
    monkeypatch.setattr(
        DistillationModule, "validation_step", lambda self, batch, i: self.log("val/loss", float("nan"))
    )
    with pytest.raises(Diverged, match="the validation loss is nan"):
        fit(module, data, tmp_path)


def test_a_teacher_that_is_no_number_is_blamed_and_not_the_rate(
    tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    module, data = made("soft_target", "text", composed)
    with torch.no_grad():
        module.teacher.network.classifier.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(Diverged, match="the teacher's outputs for this batch are not finite"):
        fit(module, data, tmp_path)


class Breaks(SoftTargetLoss):
    """Is no number from its eighth call on."""

    calls = 0

    def parts(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        self.calls += self.training
        return super().parts(student, teacher, batch) * (float("nan") if self.calls > 7 else 1)


def test_a_term_that_is_no_number_is_blamed_and_not_the_rate(
    tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    module, data = made("soft_target", "text", composed)
    module.objective.terms["kd"] = Breaks(2.0)
    with pytest.raises(Diverged, match="distillation's kd alone is not finite, for finite outputs"):
        fit(module, data, tmp_path)


def test_images_that_are_no_numbers_are_blamed(tmp_path: Path, composed: Callable[..., DictConfig]) -> None:
    module, _ = made("soft_target", "vision", composed)
    examples = examples_of("vision")
    examples["pixel_values"][3, 0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match="the batch's pixel_values have non-finite numbers: check the data"):
        fit(module, Data(examples), tmp_path)


def test_a_run_that_diverged_begins_again_at_another_rate(
    tmp_path: Path, toy_csv: Path, own_home: Path, composed: Callable[..., DictConfig]
) -> None:
    def run(*overrides: str) -> Run:
        pipeline = Run(composed(*tiny_overrides(toy_csv, tmp_path / "run"), "stages=[teacher]", *overrides))
        train_all(pipeline)
        return pipeline

    wild = ["teacher.optimizer.lr=1e30", "+teacher.trainer.gradient_clip_val=null"]
    with pytest.raises(Diverged, match=r"teacher diverged at step \d+: .*; lower teacher\.optimizer\.lr"):
        run(*wild)
    folder = tmp_path / "run" / "teacher"
    with pytest.raises(Diverged, match="diverged_2"):
        run(*wild)
    run("teacher.optimizer.lr=0.02")
    assert (folder / "stage.json").is_file()
    for name in ("diverged", "diverged_2"):
        assert {"why.json", "settings.json", "batch.safetensors"} < {path.name for path in (folder / name).iterdir()}


def test_a_teacher_that_is_no_number_is_refused_before_the_baseline_trains(
    tmp_path: Path, toy_csv: Path, own_home: Path, composed: Callable[..., DictConfig]
) -> None:
    from kd_lightning.pipeline.networks import build_network
    from kd_lightning.pipeline.teacher_loading import LoadedTeacher

    overrides = [*tiny_overrides(toy_csv, tmp_path / "run"), "teacher.cache=off"]
    pipeline = Run(composed(*overrides, "stages=[baseline,distill]"))
    part = pipeline.parts[""]
    teacher = replace(part.cfg.teacher, checkpoint="somewhere")
    pipeline.parts[""] = replace(part, cfg=replace(part.cfg, teacher=teacher))
    network, _ = build_network(teacher.network, pipeline.data, "teacher")
    with torch.no_grad():
        next(iter(network.parameters())).fill_(float("nan"))
    pipeline.providers[0].loaded = LoadedTeacher(network.eval(), "0", "somewhere", None)
    with pytest.raises(ConfigError, match="the teacher's outputs are not finite"):
        train_all(pipeline)
    assert not (tmp_path / "run" / "seed_0").exists()


@pytest.mark.slow
def test_of_several_processes_one_line_is_said(tmp_path: Path, toy_csv: Path) -> None:
    overrides = [*tiny_overrides(toy_csv, tmp_path / "run"), "trainer=ddp", "optimizer.lr=1e20"]
    done = subprocess.run(
        [sys.executable, "-m", "kd_lightning.cli.train", *overrides], cwd=ROOT, text=True,
        env={**os.environ, "KD_LIGHTNING_HOME": str(tmp_path / "home")}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "kd-train: baseline, seed 0 diverged" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "seed_0" / "baseline" / "diverged" / "batch.safetensors").is_file()
