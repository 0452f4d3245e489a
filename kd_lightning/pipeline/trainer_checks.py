"""Checks trainers, optimizers and schedules by building them before any training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from kd_lightning.config.instantiate import build, first_line, processes
from kd_lightning.config.schema import RunConfig
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.processes import launched
from kd_lightning.training.fit import make_trainer
from kd_lightning.training.optim import parameter_groups

_OURS = (
    "callbacks", "logger", "default_root_dir", "num_sanity_val_steps", "use_distributed_sampler",
    "enable_model_summary", "enable_progress_bar", "val_check_interval", "check_val_every_n_epoch",
)  # fmt: skip
"""Trainer arguments that the pipeline sets, and would set over what is given."""

_WHOLE = "the weights that score best on the whole validation split are kept"
_UNLIKE = {
    "fast_dev_run": ((False, 0), "it looks at nothing and keeps nothing; trainer.max_steps=1 makes a short run"),
    "limit_val_batches": ((None, 1.0), f"{_WHOLE}; validations=N sets how often it is evaluated"),
    "limit_train_batches": ((None, 1.0), "trainer.max_steps=N makes a short run"),
    "overfit_batches": ((0, 0.0), f"{_WHOLE}; to overfit a few examples, train on a file of them"),
    "barebones": ((False,), "it keeps no weights"),
    "enable_checkpointing": ((None, True), "the weights that score best on validation are kept"),
    "max_time": ((None,), "the baseline gets as many steps as the distillation, which time does not give"),
    "min_epochs": ((None,), "trainer.max_epochs or trainer.max_steps is the budget"),
    "min_steps": ((None,), "trainer.max_epochs or trainer.max_steps is the budget"),
    "reload_dataloaders_every_n_epochs": ((0,), "every epoch has an order of its own already"),
}
"""Trainer arguments that break what a run promises: the values that do not, and why others would."""


def check_trainers(cfg: RunConfig) -> None:
    """Check the trainer's settings for the students, and as the teacher's own change them."""
    for path, trainer in _trainers(cfg):
        for key in _OURS:
            if key in trainer:
                raise ConfigError(f"{path}.{key} is set by the pipeline; see callbacks, logger and validations")
        for key, (fine, reason) in _UNLIKE.items():
            if key in trainer and not any(trainer[key] is value or trainer[key] == value for value in fine):
                raise ConfigError(f"{path}.{key}={trainer[key]} cannot be: {reason}")
        if trainer.get("accelerator") == "cpu" and str(trainer.get("precision")) in ("16-mixed", "16-true", "16"):
            raise ConfigError(
                f"{path}.precision={trainer['precision']} needs a GPU; on a CPU use bf16-mixed or 32-true"
            )
        steps, epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
        if steps in (-1, None) and epochs in (-1, None):
            raise ConfigError(f"{path}.max_epochs or {path}.max_steps must be set: the baseline gets the same budget")
        for key, value in (("max_steps", steps), ("max_epochs", epochs)):
            if value not in (None, -1) and not (key == "max_epochs" and value == "auto") and value < 1:
                raise ConfigError(f"{path}.{key}={value} must be at least 1, or -1 for no limit")
        if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigError(f"{path}.accelerator={trainer['accelerator']} needs a GPU, and torch finds none here")
        _check_processes(path, trainer)
        if cfg.compile and processes(trainer) > 1:
            raise ConfigError(f"compile=true: the {processes(trainer)} processes of {path} would not compile; use one")


def try_trainers(cfg: RunConfig) -> None:
    """Build all optimizers, schedules, callbacks, loggers and trainers, and step the optimizers.

    Raises:
        ConfigError: Names the node of what cannot be made, or cannot step.
    """
    _try_optimizer("optimizer", cfg.optimizer, "scheduler", cfg.scheduler)
    _try_optimizer("teacher.optimizer", cfg.teacher.optimizer, "teacher.scheduler", cfg.teacher.scheduler)
    with TemporaryDirectory() as folder, _silent():
        callbacks = [_made(f"callbacks.{name}", node, L.Callback) for name, node in cfg.callbacks.items()]
        loggers = [_made(f"logger.{name}", node, Logger, save_dir=folder) for name, node in cfg.logger.items()]
        for path, trainer in _trainers(cfg):
            with named(path):
                make_trainer(trainer, callbacks, loggers, folder, 1, 1)


def _trainers(cfg: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "trainer", cfg.trainer
    yield "teacher.trainer", cfg.teacher_trainer


def _try_optimizer(path: str, node: dict[str, Any], schedule_path: str, schedule: dict[str, Any]) -> None:
    """Step an optimizer and its schedule over two weights, a matrix and a vector."""
    weights = torch.nn.Linear(2, 2)
    with torch.random.fork_rng(), named(path):
        optimizer = build(node)(parameter_groups(weights))
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"{path}: {node['_target_']} makes a {type(optimizer).__name__}, which is no optimizer")
        with named(schedule_path):
            rate = build(schedule)(optimizer, 2)
            if not hasattr(rate, "get_last_lr"):
                name = type(rate).__name__
                raise ConfigError(f"{schedule_path}: {schedule['_target_']} makes a {name}, which is no schedule")
        weights(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        with named(schedule_path):
            rate.step()


def _made(path: str, node: Any, kind: type, **given: Any) -> Any:
    """Build a node that must be one of a kind."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(
            f"{path}={node!r} has no _target_: name a {kind.__name__} of Lightning, or leave it out (~{path})"
        )
    with named(path):
        made = build(node, **given)
    if not isinstance(made, kind):
        raise ConfigError(f"{path}: {node['_target_']} is a {type(made).__name__}, which is no {kind.__name__}")
    return made


@contextmanager
def named(path: str) -> Iterator[None]:
    """Say of what libraries refuse, each with an exception of its own, which key it comes from."""
    try:
        yield
    except KDError as error:
        raise error if str(error).startswith(path) else ConfigError(f"{path}: {error}") from error
    except Exception as error:
        wrapped = isinstance(error, InstantiationException)  # Hydra's, around what a constructor raises
        raise ConfigError(f"{path}: {first_line((wrapped and error.__cause__) or error)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what Lightning prints about every trainer (its devices, its strategy) for those that train."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _check_processes(path: str, trainer: dict[str, Any]) -> None:
    """Check that the trainer's number of processes is started, or can be started by the trainer."""
    wanted, started = processes(trainer), launched()
    name = strategy_of(trainer)
    if name.startswith("fsdp") or name.endswith("FSDPStrategy"):
        raise ConfigError(
            f"{path}.strategy={name} is torch's older sharding, which narrows losses' projectors to 16 bits and does "
            "not clip by norm: use trainer=fsdp (GPUs) or trainer=fsdp2"
        )
    spawns = name.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook"))
    if started > 1 and wanted != started:
        raise ConfigError(
            f"{started} processes were started for this command (srun or torchrun), and {path} wants {wanted}: set "
            f"trainer.devices and trainer.num_nodes to match, such as trainer=ddp trainer.devices={started}"
        )
    if started > 1 and spawns:
        raise ConfigError(
            f"{path}.strategy={name} starts processes itself, and {started} are there already (srun or torchrun): use "
            "strategy=ddp (trainer=ddp)"
        )
    if started == 1 and wanted > 1 and not spawns:
        raise ConfigError(
            f"{path}.strategy={name} with {wanted} processes would start the whole command (in a sweep, the whole "
            "sweep) again in each of them: use trainer=ddp (ddp_spawn) on one machine, or start one process a device "
            f"yourself: torchrun --nproc-per-node={wanted} -m kd_lightning.cli.train ..., or srun under SLURM"
        )


def strategy_of(trainer: dict[str, Any]) -> str:
    """Return the name of a trainer's strategy."""
    strategy = trainer.get("strategy", "auto")
    return str(strategy.get("_target_") if isinstance(strategy, dict) else strategy)


def shards(trainer: dict[str, Any]) -> bool:
    """Return whether the weights are shared out to the processes."""
    return strategy_of(trainer).endswith("ModelParallelStrategy")
