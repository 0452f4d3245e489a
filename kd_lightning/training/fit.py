"""Trains a stage with Lightning: from the start, resumed, or already finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from kd_lightning.config.instantiate import build, first_line
from kd_lightning.runtime import signals
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import Interrupted, KDError
from kd_lightning.runtime.files import alone, naming, remove_temporary
from kd_lightning.runtime.limits import PATIENCE, within
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
from kd_lightning.training.stage import Training, averages, keep, validate_every

if TYPE_CHECKING:
    pass


def train(training: Training, console: Console) -> dict[str, Any]:
    """Train a stage unless it is finished, and leave its network with the best weights in its folder.

    One command at a time: another one that comes to the same folder waits, and goes on from what it finds then.

    Returns:
        The stage's record: fingerprint, settings, steps, seconds, validation scores.

    Raises:
        ConfigError: The folder holds a training with other settings.
        KDError: The training was interrupted, or diverged.
    """
    with ExitStack() as held:
        with first():
            held.enter_context(holding(training, console))
            if rank() == 0:
                put_away(training.folder)
            finished = check_fingerprint(training.folder, training.fingerprint, training.settings)
            if rank() == 0 and finished:  # a kill after the stage was finished left what it no longer needs
                remove_temporary(training.folder, alone=True)
                remove_temporary(training.folder / "checkpoints", alone=True)
                remove_checkpoints(training.folder / "checkpoints")
            elif rank() == 0:
                _clean_up(training, console)
                write_sealed(
                    training.folder / "settings.json",
                    {"fingerprint": training.fingerprint, "settings": training.settings},
                )
        if finished:
            say(console, f"{training.name}  finished before, reused from {training.folder}")
        else:
            with signals.holding():
                _fit(training, console)
    return read_stage(training.folder)


@contextmanager
def holding(training: Training, console: Console) -> Iterator[None]:
    """Hold a stage's folder, in the first process of a command; another command that comes to it waits.

    Raises:
        ConfigError: A link in the folder leads out of it.
    """
    check_stage_links(training.folder)
    if rank() != 0:
        yield
        return
    with alone(training.folder / ".lock", partial(_say_waiting, console, training)):
        yield


def _say_waiting(console: Console, training: Training, line: str) -> None:
    say(console, f"{training.name}  {line}, which trains it in {training.folder}")


def _clean_up(training: Training, console: Console) -> None:
    """Remove partial files, damaged or foreign checkpoints, and log rows after a checkpoint."""
    checkpoints = training.folder / "checkpoints"
    for folder in (training.folder, checkpoints):
        remove_temporary(folder, alone=True)
    wrong = problem(checkpoints, training.fingerprint)
    if wrong is not None:
        say(console, f"{training.name}  {wrong}: it is removed, and the stage begins again")
    if wrong is not None or not (checkpoints / RESUME).is_file():
        remove_checkpoints(checkpoints)
    for log in restore_logs(training.folder):
        say(console, f"{training.name}  {log} is damaged or missing: its rows up to the checkpoint are put back")


def _fit(training: Training, console: Console) -> None:
    """Train, in all processes; then keep the best weights, in the first."""
    resume = training.folder / "checkpoints" / RESUME
    best, timer, started = _best(training), Timer(), time.monotonic()
    watch = Divergence(training.folder, training.name, training.rate)
    callbacks = [StageProgress(training.name, console), timer, watch, best, *training.more_callbacks]
    if training.compile:
        callbacks.append(Compilation())
    module = training.module(training.network)
    trainer = _trainer(training, callbacks, resume)
    with naming(training.folder):  # loggers do not name the file that did not fit
        trainer.fit(module, datamodule=training.data, ckpt_path=resume if resume.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise Interrupted(f"{training.name} was interrupted; run the same command to resume from {resume}")
    if not best.best_model_path and trainer.world_size == 1:
        raise KDError(f"{training.name} ended without a look at validation: a callback must have stopped it before one")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _finish(logger, training, console)  # else the next stage would log into the same run
    with first():
        if rank() == 0:
            # The timer counts what a killed attempt took, too; it stays in spawned processes where there are several.
            seconds = max(timer.time_elapsed("train"), time.monotonic() - started)
            device = trainer.strategy.root_device
            keep(training, module, Path(best.best_model_path), training.steps, seconds, device)
            remove_checkpoints(training.folder / "checkpoints")


def _finish(logger: WandbLogger, training: Training, console: Console) -> None:
    """End W&B's run of a stage; what cannot be sent in time stays in the stage's folder."""
    try:
        within(PATIENCE, logger.experiment.finish)
    except Exception as error:  # the training is done, and W&B's errors are of many kinds
        say(console, f"{training.name}  its W&B run is not finished: {first_line(error)}")


def _best(training: Training) -> ModelCheckpoint:
    task = training.data.task
    return ModelCheckpoint(
        training.folder / "checkpoints", "best", monitor=f"val/{task.monitor}", mode=task.mode,
        save_weights_only=not averages(training.callbacks), enable_version_counter=False,
    )  # fmt: skip


def _trainer(training: Training, callbacks: list[L.Callback], resume: Path) -> L.Trainer:
    """Build the trainer; the callbacks that the pipeline relies on come before the user's."""
    callbacks = [*callbacks, Preemption(resume, training.checkpoint_every, training.name)]
    callbacks += [build(node) for node in training.callbacks.values()]
    loggers = [build(node, save_dir=str(training.folder)) for node in training.loggers.values()]
    batches = len(training.data.train_dataloader())
    every = validate_every(batches, training.steps, training.validations, training.trainer)
    return make_trainer(
        training.trainer,
        callbacks,
        loggers,
        str(training.folder),
        training.steps,
        every,
        [SealedCheckpoints(training.fingerprint)],
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
