"""One training with Lightning, from a stage's folder and back to it: begun, gone on with, or already finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from kd_lightning.config.instantiate import build
from kd_lightning.runtime import signals
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import Interrupted, KDError
from kd_lightning.runtime.files import alone, naming, remove_temporary
from kd_lightning.runtime.processes import environment, first, rank
from kd_lightning.runtime.seals import write_sealed
from kd_lightning.training.callbacks import Compilation, Divergence, Preemption, StageProgress
from kd_lightning.training.callbacks.checkpoints import (
    RESUME,
    SealedCheckpoints,
    problem,
    remove_checkpoints,
    restore_logs,
)
from kd_lightning.training.callbacks.divergence import put_away
from kd_lightning.training.links import check_stage_links
from kd_lightning.training.run_folder import check_fingerprint, read_stage
from kd_lightning.training.stage import Stage, averages, keep, planned_steps, validate_every

if TYPE_CHECKING:
    pass


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
            finished = check_fingerprint(stage.folder, stage.fingerprint, stage.settings)
            if rank() == 0 and finished:  # a kill after the stage was finished left what it no longer needs
                remove_temporary(stage.folder, alone=True)
                remove_temporary(stage.folder / "checkpoints", alone=True)
                remove_checkpoints(stage.folder / "checkpoints")
            elif rank() == 0:
                _clean_up(stage, console)
                write_sealed(
                    stage.folder / "settings.json", {"fingerprint": stage.fingerprint, "settings": stage.settings}
                )
        if finished:
            say(console, f"{stage.name}  finished before, reused from {stage.folder}")
        else:
            with signals.holding():
                _fit(stage, console)
    return read_stage(stage.folder)


def _say_waiting(console: Console, stage: Stage, line: str) -> None:
    say(console, f"{stage.name}  {line}, which trains it in {stage.folder}")


def _clean_up(stage: Stage, console: Console) -> None:
    """Remove what cannot be gone on from: half-written files, damaged or foreign checkpoints, rows that follow one."""
    checkpoints = stage.folder / "checkpoints"
    for folder in (stage.folder, checkpoints):
        remove_temporary(folder, alone=True)
    wrong = problem(checkpoints, stage.fingerprint)
    if wrong is not None:
        say(console, f"{stage.name}  {wrong}: it is removed, and the stage begins again")
    if wrong is not None or not (checkpoints / RESUME).is_file():
        remove_checkpoints(checkpoints)
    for log in restore_logs(stage.folder):
        say(console, f"{stage.name}  {log} is damaged or missing: its rows up to the checkpoint are put back")


def _fit(stage: Stage, console: Console) -> None:
    """Train, in all processes; then keep the best weights, in the first."""
    steps = stage.steps or planned_steps(stage.trainer, len(stage.data.train_dataloader()))
    resume = stage.folder / "checkpoints" / RESUME
    best, timer, started = _best(stage), Timer(), time.monotonic()
    watch = Divergence(stage.folder, stage.name, stage.rate)
    callbacks = [StageProgress(stage.name, console), timer, watch, best, *stage.more_callbacks]
    if stage.compile:
        callbacks.append(Compilation())
    module = stage.module(stage.network)
    trainer = _trainer(stage, steps, callbacks, resume)
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
            keep(stage, module, Path(best.best_model_path), steps, seconds, trainer.strategy.root_device)
            remove_checkpoints(stage.folder / "checkpoints")


def _best(stage: Stage) -> ModelCheckpoint:
    return ModelCheckpoint(
        stage.folder / "checkpoints", "best", monitor=f"val/{stage.data.task.main}", mode="max",
        save_weights_only=not averages(stage.callbacks), enable_version_counter=False,
    )  # fmt: skip


def _trainer(stage: Stage, steps: int, callbacks: list[L.Callback], resume: Path) -> L.Trainer:
    """Build the trainer; the callbacks that the pipeline relies on come before the user's."""
    callbacks = [*callbacks, Preemption(resume, stage.checkpoint_every, stage.name)]
    callbacks += [build(node) for node in stage.callbacks.values()]
    loggers = [build(node, save_dir=str(stage.folder)) for node in stage.loggers.values()]
    every = validate_every(len(stage.data.train_dataloader()), steps, stage.validations, stage.trainer)
    return make_trainer(
        stage.trainer, callbacks, loggers, str(stage.folder), steps, every, [SealedCheckpoints(stage.fingerprint)]
    )


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
