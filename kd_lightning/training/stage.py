"""One training of one network, and what it leaves in its folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from kd_lightning.config.instantiate import lookup, processes
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.fingerprints import digest
from kd_lightning.tasks.evaluation import evaluate, of_network
from kd_lightning.training.run_folder import finish_stage, save_network

VERSION = 1
"""Raised when the same settings train other weights: what is half trained, or was trained before, is then refused."""

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.data.datamodule import Role
    from kd_lightning.training.module import NetworkModule


@dataclass(kw_only=True)
class TrainingRecord:
    """What a training's folder tells of it.

    Attributes:
        name: What it is called on the screen, e.g. "distill, seed 0".
        folder: Where its files go.
        settings: Everything that decides its result; their digest is its fingerprint.
        network_settings: How to build its network again.
        data: The data, with the training examples of this stage selected.
        role: Whose inputs the network reads.
        notes: What else its record holds.
        rate: The key of its learning rate.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    network_settings: dict[str, Any]
    data: IndexedData
    role: Role
    notes: dict[str, Any] = field(default_factory=dict)
    rate: str = "optimizer.lr"

    @property
    def fingerprint(self) -> str:
        """The digest of its settings."""
        return digest(self.settings)


@dataclass(kw_only=True)
class Training(TrainingRecord):
    """All that `train` needs for one network.

    Attributes:
        network: The network to train, freshly initialised.
        module: Makes the LightningModule around the network.
        trainer: Settings of `lightning.Trainer`.
        validations: How many looks at the validation split.
        checkpoint_every: Optimizer steps between checkpoints to resume from.
        callbacks: Settings of further callbacks by name.
        loggers: Settings of loggers by name.
        steps: Optimizer steps.
        compile: Whether to `torch.compile` the network and its peers, for batches of any shape.
        more_callbacks: Callbacks that the stage itself needs.
    """

    network: nn.Module
    module: Callable[[nn.Module], NetworkModule]
    trainer: dict[str, Any]
    validations: int
    checkpoint_every: int
    callbacks: dict[str, Any]
    loggers: dict[str, Any]
    steps: int
    compile: bool = False
    more_callbacks: list[L.Callback] = field(default_factory=list)


def planned_steps(trainer: dict[str, Any], labelled: int, batch_size: int, examples: int = 0) -> int:
    """Return the optimizer steps of a trainer's settings; views and transfer sets do not change them.

    Args:
        trainer: With `max_steps`, or `max_epochs`: epochs of the labelled examples, or `auto`.
        labelled: How many labelled examples there are.
        batch_size: Examples in a batch of one process.
        examples: How many examples `auto` stands for.

    >>> trainer = {"max_epochs": 3, "devices": 1}
    >>> planned_steps(trainer, labelled=100, batch_size=32)
    12
    >>> planned_steps(trainer | {"max_epochs": "auto"}, labelled=100, batch_size=32, examples=640)
    20
    """
    if trainer.get("max_steps") not in (-1, None):
        return int(trainer["max_steps"])
    accumulate, workers = int(trainer.get("accumulate_grad_batches", 1)), processes(trainer)
    if trainer["max_epochs"] == "auto":
        return max(math.ceil(examples / (batch_size * accumulate * workers)), 1)
    batches = math.ceil(math.ceil(labelled / batch_size) / workers)
    return int(trainer["max_epochs"]) * math.ceil(batches / accumulate)


def keep(
    training: TrainingRecord, module: NetworkModule, best: Path, steps: int, seconds: float, device: torch.device
) -> None:
    """Score the best weights on validation and write what the training leaves behind.

    Raises:
        KDError: The training diverged.
    """
    checkpoint = torch.load(best, map_location="cpu", weights_only=True)
    network = module.whole
    network.load_state_dict(module.weights_of_trained(checkpoint["state_dict"]))
    data, task = training.data, training.data.task
    scores = evaluate(task, of_network(network, device), data.val_dataloader(), device).scores
    if bad := [name for name, score in scores.items() if not math.isfinite(score)]:
        raise KDError(f"{training.name} diverged: its validation {bad[-1]} is {scores[bad[-1]]}; lower {training.rate}")
    read = {
        "class_names": data.class_names, "predicts": task.description, **data.input_format,
        "role": training.role, "data": data.labelled,
    }  # fmt: skip
    tokenizer = data.tokenizer_of(training.role)
    save_network(training.folder, network, training.network_settings, read, tokenizer)
    record: dict[str, Any] = {
        "fingerprint": training.fingerprint,
        "settings": training.settings,
        "steps": steps,
        "best_step": int(checkpoint["global_step"]),
        "seconds": seconds,
        "validation": scores,
        "monitor": task.monitor,
        "mode": task.mode,
        **training.notes,
    }
    finish_stage(training.folder, record)


def averages(callbacks: dict[str, Any]) -> bool:
    """Return whether callbacks average weights, which Lightning keeps only in whole checkpoints."""
    kinds = [lookup(node["_target_"]) for node in callbacks.values()]
    return any(isinstance(kind, type) and issubclass(kind, WeightAveraging) for kind in kinds)


def validate_every(batches: int, steps: int, validations: int, trainer: dict[str, Any]) -> int:
    """Return after how many batches of one process to look at the validation split.

    Where an accumulation does not divide an epoch, the epoch's last step is over fewer batches, and so the training.
    """
    accumulate = int(trainer.get("accumulate_grad_batches", 1))
    batches = math.ceil(batches / processes(trainer))
    if batches % accumulate == 0:
        return max(steps // validations, 1) * accumulate
    epochs, rest = divmod(steps, math.ceil(batches / accumulate))
    return max((epochs * batches + rest * accumulate) // validations, 1)
