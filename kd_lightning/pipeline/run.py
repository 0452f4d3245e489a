"""Runs the stages: teacher, assistants, baseline, distilled and fine-tuned student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from kd_lightning.pipeline.estimate import estimate
from kd_lightning.pipeline.generate import add_texts
from kd_lightning.pipeline.preflight import preflight
from kd_lightning.pipeline.prepare import prepare
from kd_lightning.pipeline.run_records import write_plan
from kd_lightning.pipeline.shared import link_shared
from kd_lightning.pipeline.stages import Stage, plan
from kd_lightning.pipeline.teacher_check import finish_teacher
from kd_lightning.runtime.clock import duration
from kd_lightning.runtime.console import say
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.processes import rank
from kd_lightning.tasks.evaluation import evaluate
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.fit import holding, train
from kd_lightning.training.run_folder import is_finished, read_stage, validation_score, write_config

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Part, Run


def train_all(run: Run, begin: Callable[[], None] | None = None, command: str = "") -> None:
    """Train every configured stage that is not finished yet.

    Args:
        run: What is trained.
        begin: Called once nothing is refused any more, and before anything is trained or written.
        command: The command that goes on with it, for `kd-status`.

    Raises:
        ConfigError: Before any training, for what does not fit.
    """
    stages = plan(run)
    trials = preflight(run, stages)
    if begin is not None:
        begin()
    link_shared(run, stages)
    distils = any(stage.distils for stage in stages)
    if distils:
        add_texts(run)  # where the teacher is finished, so that the estimate counts them
    if rank() == 0:
        run.clock = estimate(run, stages, trials)
    for stage in stages:
        if stage.distils:
            add_texts(run)
        fresh = not is_finished(run.folder / stage.path)
        if fresh:  # where the first stages are finished, with these settings
            _keep_plan(run, stages, command)
        _train(run, stage)
        if fresh or not (run.folder / "config.yaml").is_file():  # it can be used while the others are trained
            _keep_config(run)
        if run.clock is not None and stage.path in run.clock.parts:
            say(run.console, f"about {duration(run.clock.left(stage.path))} left")
    _keep_plan(run, stages, command)
    _keep_config(run)


def _keep_plan(run: Run, stages: Sequence[Stage], command: str) -> None:
    """Write what is going to be trained; no finished stage has refused it so far."""
    if rank() == 0:
        write_plan(run.folder, stages, run.clock, command)


def _keep_config(run: Run) -> None:
    """Write the run's configuration, and each task's own; no finished stage has refused it."""
    if rank() == 0:
        whole = {part.folder: part.cfg for part in run.parts.values() if part.name and run.has_teacher}
        for folder, cfg in {run.folder: run.cfg, **whole}.items():
            kept = cfg.as_dict() | {"run_dir": str(folder.absolute())}
            write_config(folder, OmegaConf.to_yaml(OmegaConf.create(kept)))


def _train(run: Run, stage: Stage) -> None:
    """Train one stage; a teacher until it has learned."""
    training = prepare(run, stage)
    with holding(training, run.console):  # a command that shares the teacher waits for its check, too
        train(training, run.console)
        if stage.kind == "teacher":
            finish_teacher(run, stage)
            run.forget_teachers()  # what was read of them before may not be the best of them any more


def score(run: Run) -> float:
    """Return a sweep's objective: the last stage's best validation score, averaged over seeds."""
    if run.cfg.stages == ["teacher"]:
        scores = [_teacher_score(run, part) for part in run.parts.values()]
    else:
        last = run.cfg.stages[-1]
        scores = [validation_score(read_stage(run.folder / f"seed_{seed}" / last)) for seed in run.seeds]
    return sum(scores) / len(scores)


def _teacher_score(run: Run, part: Part) -> float:
    provider = run.provider_of(part)
    data, task = part.data.select(tokens="teacher"), part.data.task
    loaded = provider.loaded
    teacher = provider.teacher() if loaded.members else FrozenTeacher(loaded.network, part.cfg.teacher.precision)
    return evaluate(task, teacher.to(run.device), data.val_dataloader(), run.device).scores[task.monitor]


def build_caches(run: Run, share: tuple[int, int] = (0, 1)) -> list[Path]:
    """Fill the teacher's cache; return its folder, or those of an ensemble's members.

    Args:
        run: Whose teacher.
        share: Which of how many shares of the examples, where several processes fill it at the same time.

    Raises:
        ConfigError: Nothing is kept; or shares of a teacher that is not finished, or of a cache that is replaced.
    """
    if run.cfg.teacher.cache == "off" or run.cfg.teacher.ema is not None:
        raise ConfigError("teacher.cache=off, or teacher.ema, keeps no outputs: there is nothing to build")
    stages, alone = plan(run), share[1] == 1
    if not alone and run.cfg.teacher.cache == "refresh":
        raise ConfigError("teacher.cache=refresh replaces a cache as a whole: one process builds it; use another path")
    if not alone and not all(part.has_teacher for part in run.parts.values()):
        raise ConfigError("a cache is built in shares from a finished teacher: train it first (stages=[teacher])")
    preflight(run, stages)
    for stage in stages:
        if stage.kind == "teacher" and alone:
            _train(run, stage)
    add_texts(run)
    run.providers[0].complete(share)
    return [cache.folder for cache in run.providers[0].caches()]
