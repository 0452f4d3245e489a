"""One training with Lightning, from a stage's folder and back to it: begun, gone on with, or already finished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer, WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from torch import nn

from kd_lightning import preemption
from kd_lightning.borders import visible
from kd_lightning.callbacks import Compilation, Divergence, Preemption, StageProgress
from kd_lightning.callbacks.checkpoints import RESUME, SealedCheckpoints, problem, remove_checkpoints, restore_logs
from kd_lightning.callbacks.divergence import put_away
from kd_lightning.config import build, lookup, processes
from kd_lightning.errors import Interrupted, KDError
from kd_lightning.files import alone, naming, remove_temporary
from kd_lightning.links import check_stage_links
from kd_lightning.models.answers import network_answers
from kd_lightning.processes import environment, first, rank
from kd_lightning.runs import check_fingerprint, digest, finish_stage, read_stage, save_network
from kd_lightning.seals import write_sealed

if TYPE_CHECKING:
    from kd_lightning.base import NetworkModule
    from kd_lightning.data import ClassificationData
    from kd_lightning.data.base import Role


@dataclass
class Stage:
    """One training of one network.

    Attributes:
        name: What it is called on the screen, e.g. "distill, seed 0".
        folder: Where its files go.
        settings: Everything that decides its result; their digest is its fingerprint.
        network: The network to train, freshly initialised.
        network_settings: How to build that network again.
        module: Makes the LightningModule around the network.
        data: The data, with the training examples of this stage selected.
        role: Whose inputs the network reads.
        trainer: Settings of `lightning.Trainer`.
        validations: How many looks at the validation split.
        checkpoint_every: Optimizer steps between checkpoints to resume from.
        callbacks: Settings of further callbacks by name.
        loggers: Settings of loggers by name.
        steps: Optimizer steps; None: as the trainer's `max_steps` or `max_epochs` say.
        compile: Whether to `torch.compile` the network and its peers, for batches of any shape.
        more_callbacks: Callbacks that the stage itself needs.
        notes: What else its record says.
        rate: The key of its learning rate.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    network: nn.Module
    network_settings: dict[str, Any]
    module: Callable[[nn.Module], NetworkModule]
    data: ClassificationData
    role: Role
    trainer: dict[str, Any]
    validations: int
    checkpoint_every: int
    callbacks: dict[str, Any]
    loggers: dict[str, Any]
    steps: int | None = None
    compile: bool = False
    more_callbacks: list[L.Callback] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    rate: str = "optimizer.lr"


def planned_steps(trainer: dict[str, Any], batches: int) -> int:
    """Return the optimizer steps that a trainer's settings ask for, over epochs of so many batches of one process."""
    if trainer.get("max_steps") not in (-1, None):
        return int(trainer["max_steps"])
    batches = math.ceil(batches / processes(trainer))
    return int(trainer["max_epochs"]) * math.ceil(batches / int(trainer.get("accumulate_grad_batches", 1)))


def train(stage: Stage, console: Console) -> dict[str, Any]:
    """Train a stage unless it is finished, and leave its network with the best weights in its folder.

    One command at a time: another one that comes to the same folder waits, and goes on from what it finds then.

    Returns:
        The stage's record: fingerprint, settings, steps, seconds, validation scores.

    Raises:
        ConfigError: The folder holds a training with other settings.
        KDError: The training was interrupted, or diverged.
    """
    check_stage_links(stage.folder)
    with ExitStack() as held:
        with first():
            if rank() == 0:
                told = partial(_say_waiting, console, stage)
                held.enter_context(alone(stage.folder / ".lock", told))
                put_away(stage.folder)
            fingerprint = digest(stage.settings)
            finished = check_fingerprint(stage.folder, fingerprint, stage.settings)
            if rank() == 0 and finished:  # a kill after the stage was finished left what it no longer needs
                remove_temporary(stage.folder, alone=True)
                remove_temporary(stage.folder / "checkpoints", alone=True)
                remove_checkpoints(stage.folder / "checkpoints")
            elif rank() == 0:
                _clean_up(stage, fingerprint, console)
                write_sealed(stage.folder / "settings.json", {"fingerprint": fingerprint, "settings": stage.settings})
        if finished:
            say(console, f"{stage.name}  finished before, reused from {stage.folder}")
        else:
            with preemption.holding():
                _fit(stage, fingerprint, console)
    return read_stage(stage.folder)


def _say_waiting(console: Console, stage: Stage, line: str) -> None:
    say(console, f"{stage.name}  {line}, which trains it in {stage.folder}")


def _clean_up(stage: Stage, fingerprint: str, console: Console) -> None:
    """Remove what cannot be gone on from: half-written files, damaged or foreign checkpoints, rows that follow one."""
    checkpoints = stage.folder / "checkpoints"
    for folder in (stage.folder, checkpoints):
        remove_temporary(folder, alone=True)
    wrong = problem(checkpoints, fingerprint)
    if wrong is not None:
        say(console, f"{stage.name}  {wrong}: it is removed, and the stage begins again")
    if wrong is not None or not (checkpoints / RESUME).is_file():
        remove_checkpoints(checkpoints)
    for log in restore_logs(stage.folder):
        say(console, f"{stage.name}  {log} is damaged or missing: its rows up to the checkpoint are put back")


def _fit(stage: Stage, fingerprint: str, console: Console) -> None:
    """Train, in all processes; then keep the best weights, in the first."""
    steps = stage.steps or planned_steps(stage.trainer, len(stage.data.train_dataloader()))
    resume = stage.folder / "checkpoints" / RESUME
    best, timer, started = _best(stage), Timer(), time.monotonic()
    watch = Divergence(stage.folder, stage.name, stage.rate)
    callbacks = [StageProgress(stage.name, console), timer, watch, best, *stage.more_callbacks]
    if stage.compile:
        callbacks.append(Compilation())
    module = stage.module(stage.network)
    trainer = _trainer(stage, steps, callbacks, resume, fingerprint)
    with naming(stage.folder):  # loggers do not say which file did not fit
        trainer.fit(module, datamodule=stage.data, ckpt_path=resume if resume.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise Interrupted(f"{stage.name} was interrupted; the same command goes on from {resume}")
    if not best.best_model_path and trainer.world_size == 1:
        raise KDError(f"{stage.name} ended without a look at validation: a callback must have stopped it before one")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # else the next stage would log into the same run
    with first():
        if rank() == 0:
            # The timer counts what a killed attempt took, too; it stays in spawned processes where there are several.
            seconds = max(timer.time_elapsed("train"), time.monotonic() - started)
            _keep(stage, fingerprint, module, Path(best.best_model_path), steps, seconds, trainer.strategy.root_device)


def _keep(
    stage: Stage, fingerprint: str, module: NetworkModule, best: Path, steps: int, seconds: float, device: torch.device
) -> None:
    """Score the best weights on validation and write what the stage leaves behind; checkpoints go.

    Raises:
        KDError: The training diverged.
    """
    checkpoint = torch.load(best, map_location="cpu", weights_only=True)
    network = module.whole
    network.load_state_dict(module.weights_of_trained(checkpoint["state_dict"]))
    validation = network_answers(network, stage.data.val_dataloader(), device)
    scores = stage.data.task.evaluate(validation)
    if bad := [name for name, score in scores.items() if not math.isfinite(score)]:
        raise KDError(f"{stage.name} diverged: its validation {bad[-1]} is {scores[bad[-1]]}; lower {stage.rate}")
    task = {
        "class_names": stage.data.class_names, "predicts": stage.data.task.description, **stage.data.input_format,
        "role": stage.role, "data": stage.data.labelled,
    }  # fmt: skip
    tokenizer = stage.data.tokenizer_of(stage.role)
    save_network(stage.folder, network, stage.network_settings, task, tokenizer)
    record: dict[str, Any] = {
        "fingerprint": fingerprint,
        "settings": stage.settings,
        "steps": steps,
        "best_step": int(checkpoint["global_step"]),
        "seconds": seconds,
        "validation": scores,
        "selected_by": stage.data.task.main,
        **stage.notes,
    }
    finish_stage(stage.folder, record)
    remove_checkpoints(stage.folder / "checkpoints")


def say(console: Console, line: str) -> None:
    """Print one line as it is: unbroken, and without reading markup into a path or a sentence."""
    console.print(visible(line, keep="\n"), highlight=False, soft_wrap=True, markup=False)


def _best(stage: Stage) -> ModelCheckpoint:
    return ModelCheckpoint(
        stage.folder / "checkpoints", "best", monitor=f"val/{stage.data.task.main}", mode="max",
        save_weights_only=not averages(stage.callbacks), enable_version_counter=False,
    )  # fmt: skip


def averages(callbacks: dict[str, Any]) -> bool:
    """Return whether callbacks average weights, which Lightning validates and puts into whole checkpoints only."""
    kinds = [lookup(node["_target_"]) for node in callbacks.values()]
    return any(isinstance(kind, type) and issubclass(kind, WeightAveraging) for kind in kinds)


def _trainer(stage: Stage, steps: int, callbacks: list[L.Callback], resume: Path, fingerprint: str) -> L.Trainer:
    """Build the trainer; the callbacks that the pipeline relies on come before the user's."""
    callbacks = [*callbacks, Preemption(resume, stage.checkpoint_every, stage.name)]
    callbacks += [build(node) for node in stage.callbacks.values()]
    loggers = [build(node, save_dir=str(stage.folder)) for node in stage.loggers.values()]
    every = validate_every(len(stage.data.train_dataloader()), steps, stage.validations, stage.trainer)
    return make_trainer(
        stage.trainer, callbacks, loggers, str(stage.folder), steps, every, [SealedCheckpoints(fingerprint)]
    )


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


def make_trainer(
    settings: dict[str, Any],
    callbacks: list[L.Callback],
    loggers: list[Any],
    folder: str,
    steps: int,
    every: int,
    io: Sequence[SealedCheckpoints] = (),
) -> L.Trainer:
    """Build a trainer from a configuration's settings and what the pipeline decides."""
    plugins = [build(node) for node in settings.get("plugins") or ()]
    settings = {
        **settings, "plugins": None, "max_steps": steps, "max_epochs": -1, "val_check_interval": every,
        "check_val_every_n_epoch": None,
    }  # fmt: skip
    trainer: L.Trainer = build(
        settings, callbacks=callbacks, logger=loggers or False, default_root_dir=folder,
        num_sanity_val_steps=0, use_distributed_sampler=False, enable_model_summary=False, enable_progress_bar=False,
        plugins=[*plugins, environment(), *io],
    )  # fmt: skip
    return trainer
