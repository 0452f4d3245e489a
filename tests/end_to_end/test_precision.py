"""Sixteen bits: losses are computed in float32 all the same, and stay finite; steps that overflow are counted."""

from __future__ import annotations

import csv
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from torch import Tensor, nn

from kd_lightning.tasks import Regression
from kd_lightning.training.distillation import SupervisedModule
from tests import ROOT
from tests.config.test_catalog import ALONE, STRATEGIES, Data, Gradients, made
from tests.losses.conformance import Case
from tests.ranks import scaled

FILES = sorted(file.stem for file in (ROOT / "tests/losses").glob("test_*.py"))
CASES: list[Case] = [
    case for file in FILES for case in getattr(importlib.import_module(f"tests.losses.{file}"), "CASES", [])
]
LARGEST = 1e4
PRECISIONS = ("bf16-mixed", "16-mixed", "bf16-true")
TRAININGS = [
    pytest.param(name, strategy.models[0], PRECISIONS[i % 3], marks=pytest.mark.slow if i % 4 else ())
    for i, (name, strategy) in enumerate(STRATEGIES.items())
    if strategy.models[0] not in ALONE
]
"""Each strategy with its first kind of models, in one of the three."""


def enlarged(x: Tensor) -> Tensor:
    """Stretch values to the largest; probabilities and labels stay."""
    probabilities = not x.is_floating_point() or bool((x >= 0).all())
    return x if probabilities else x * (LARGEST / x.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_of_large_values_are_finite(case: Case, dtype: torch.dtype) -> None:
    tensors = [enlarged(x).to(dtype) if x.is_floating_point() else x for x in case.tensors]
    tensors[0].requires_grad_()
    takes = inspect.signature(case.function).parameters
    hot = {"temperature": 20.0} if "temperature" in takes and "max_temperature" not in takes else {}
    value = case(*tensors, **hot)
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    (gradient,) = torch.autograd.grad(value, tensors[0])

    wide = [x.detach().float() if x.is_floating_point() else x for x in tensors]
    (exact,) = torch.autograd.grad(case(wide[0].requires_grad_(), *wide[1:], **hot), wide[0])
    assert torch.isfinite(exact).all()
    fits = exact.abs() < torch.finfo(dtype).max  # that of a product of features (fsp) may be larger than float16 knows
    assert torch.isfinite(gradient[fits]).all()


def train(
    module: L.LightningModule, data: L.LightningDataModule, ckpt_path: Path | None = None, **options: Any
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **{"max_epochs": 2, "logger": False, **options},
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(("name", "kind", "precision"), TRAININGS)
def test_every_strategy_trains_in_sixteen_bits(
    name: str, kind: str, precision: str, composed: Callable[..., DictConfig]
) -> None:
    module, data = made(name, kind, composed, "temperature=20")
    gradients = Gradients()
    seen: list[torch.dtype] = []
    module.objective.register_forward_hook(lambda *given: seen.append(given[2][0].dtype))
    options = {"plugins": [scaled(2.0**10)]} if precision == "16-mixed" else {"precision": precision}
    train(module, data, callbacks=[gradients], **options)
    assert len(gradients.losses) == 4
    assert all(map(torch.isfinite, map(torch.tensor, gradients.losses)))
    assert set(seen) == {torch.float32}
    narrow = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in module.student.parameters()} == {narrow}
    assert {parameter.dtype for parameter in module.objective.parameters()} <= {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_labels_that_are_numbers_stay_what_they_are() -> None:
    """As of several tasks, or of a regression: bfloat16 knows 256 and 258, and no 257."""
    module, data = overflowing(257.0)
    seen: list[Tensor] = []
    module.objective.register_forward_pre_hook(lambda _, given: seen.append(given[2]["labels"]))
    train(module, data, precision="bf16-true", max_steps=1)
    assert seen[0].dtype == torch.float32
    assert (seen[0] == 257).all()


def overflowing(label: float) -> tuple[SupervisedModule, Data]:
    """A score to regress, far away."""
    examples = {"pixel_values": torch.ones(16, 2), "labels": torch.full((16,), label), "index": torch.arange(16)}
    torch.manual_seed(0)
    module = SupervisedModule(nn.Linear(2, 1), partial(torch.optim.SGD, lr=1e-6), task=Regression())
    return module, Data(examples)


class Steps(L.Callback):
    """The first weight after every step."""

    def __init__(self) -> None:
        self.weights: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights.append(float(next(pl_module.parameters()).detach().flatten()[0]))


def test_steps_that_overflow_are_left_out_counted_and_logged(tmp_path: Path) -> None:
    module, data = overflowing(100.0)
    steps, logger = Steps(), CSVLogger(tmp_path)
    trainer = train(module, data, plugins=[scaled(2.0**10)], callbacks=[steps], logger=logger, log_every_n_steps=1)
    moved = [a != b for a, b in pairwise([float(overflowing(100.0)[0].network.weight[0, 0].detach()), *steps.weights])]
    assert module.skipped_steps == moved.count(False) > 0
    assert moved[-1], "the scale has come down"
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [float(row["train/skipped_steps"]) for row in csv.DictReader(file) if row.get("train/skipped_steps")]
    assert logged == [moved[:step].count(False) for step in range(len(moved))]
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    again, data = overflowing(100.0)
    train(again, data, plugins=[scaled(1.0)], max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert again.skipped_steps == module.skipped_steps, "a resumed training goes on counting"


def test_without_a_scaler_nothing_is_counted(tmp_path: Path) -> None:
    module, data = overflowing(100.0)
    logger = CSVLogger(tmp_path)
    train(module, data, precision="bf16-mixed", logger=logger, log_every_n_steps=1)
    assert "train/loss" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "skipped" not in (Path(logger.log_dir) / "metrics.csv").read_text()
