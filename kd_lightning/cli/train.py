"""`kd-train`: compose a configuration with Hydra and run its stages."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import hydra
from omegaconf import DictConfig

from kd_lightning.config import instantiate as config
from kd_lightning.pipeline import sweep_point as points
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.runtime import signals as preemption
from kd_lightning.runtime.borders import Plain
from kd_lightning.runtime.errors import Interrupted, KDError, environment_fault, interruptible
from kd_lightning.runtime.processes import rank
from kd_lightning.runtime.slurm_logs import link_logs

if TYPE_CHECKING:
    from kd_lightning.pipeline.run import Pipeline


@hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name="config")
def _run(cfg: DictConfig) -> float:
    """Run one composed configuration; returns the best validation score, averaged over seeds, for a sweeper."""
    try:
        if not config.in_sweep():
            return _train(cfg).score()
        config.place(cfg)
        with points.recorded(cfg) as point:
            pipeline = _train(cfg)
            point.score, point.metric = pipeline.score(), pipeline.task.main
        return point.score
    except KDError as error:  # here, since Hydra adds lines of its own to an exception that leaves a job
        if config.in_sweep() and not isinstance(error, Interrupted):
            raise  # the sweep goes on, and raises it at its end
        _end(error)
    except Exception as error:
        said = None if config.in_sweep() else _explained(error)
        if said is None:
            raise
        _end(said)


def _end(reason: object) -> NoReturn:
    """Leave with one line: of several processes, the first says it."""
    sys.exit(1 if rank() > 0 else f"kd-train: {reason}")


def _explained(error: Exception) -> str | None:
    """Return what a user can mend, in one line; None for a defect of ours."""
    from kd_lightning.cli.hydra_errors import explain

    return explain(error, sys.argv[1:]) or environment_fault(error)


def _train(cfg: DictConfig) -> Pipeline:
    from rich.console import Console

    from kd_lightning.pipeline.validation import validate
    from kd_lightning.runtime.processes import first, join

    preemption.watch()
    validate(cfg)
    join()
    from kd_lightning.pipeline.compare import compare
    from kd_lightning.pipeline.multi_task import pipeline_of
    from kd_lightning.runtime.log_filters import quiet
    from kd_lightning.runtime.threads import settle_threads

    quiet()
    settle_threads()
    log = logging.getLogger("kd_lightning")  # what we noticed in the data and the models, as plain lines
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    log.handlers = [logging.StreamHandler()]
    log.handlers[0].setFormatter(Plain())
    with first():
        pipeline = pipeline_of(cfg, Console(quiet=rank() > 0))
    pipeline.run(begin=lambda: link_logs(pipeline.folder))
    with first():
        if rank() == 0:
            compare(pipeline, points.command(cfg))
    return pipeline


@interruptible("kd-train", "nothing was being trained; the same command goes on")
def main() -> None:
    """Entry point: a user's mistake ends in one line, anything else in its traceback."""
    register_resolvers()
    sys.path.insert(0, os.getcwd())  # a user's own networks and losses are named by the module they start us beside
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and what the user reads is decided here
    try:
        _run()
    except KDError as error:  # the first point of a sweep that failed
        _end(error)
    except Exception as error:
        said = _explained(error)
        if said is None:
            raise
        _end(said)


if __name__ == "__main__":
    main()
