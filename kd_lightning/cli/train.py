"""`kd-train`: compose a configuration with Hydra and run its stages."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from kd_lightning.cli.hydra_errors import explained
from kd_lightning.cli.runner import begin, command, import_from_here
from kd_lightning.config.instantiate import conf_dir, in_sweep, place
from kd_lightning.pipeline import sweep_point
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.pipeline.sweep_point import recorded
from kd_lightning.runtime.borders import Plain
from kd_lightning.runtime.errors import Interrupted
from kd_lightning.runtime.processes import rank
from kd_lightning.runtime.signals import watch
from kd_lightning.runtime.slurm_logs import link_logs

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run


_ended = partial(command, "kd-train", "nothing was being trained; the same command goes on", first_only=True)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def _run(cfg: DictConfig) -> float:
    """Run a composed configuration; return the best validation score, averaged over seeds."""
    if in_sweep():
        return _point(cfg)
    with _ended(), explained(sys.argv[1:]):  # here, since Hydra adds lines to exceptions from a job
        run = _train(cfg)
        return _aim(run, _score(run))


def _point(cfg: DictConfig) -> float:
    """Run a point of a sweep; the sweep continues after an error and raises it at the end."""
    place(cfg)
    try:
        with recorded(cfg) as point:
            run = _train(cfg)
            point.score, point.metric = _score(run), run.task.monitor
    except Interrupted:
        with _ended():
            raise
    return _aim(run, point.score)


def _aim(run: Run, score: float) -> float:
    """Return what a sweeper maximises."""
    return score if run.task.mode == "max" else -score


def _train(cfg: DictConfig) -> Run:
    from rich.console import Console

    from kd_lightning.pipeline.validation import validate
    from kd_lightning.runtime.processes import first, join

    watch()
    checked = validate(cfg)
    join()
    from kd_lightning.pipeline.compare import compare
    from kd_lightning.pipeline.context import Run
    from kd_lightning.pipeline.run import train_all

    begin()
    log = logging.getLogger("kd_lightning")  # notices about data and models, as plain lines
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    log.handlers = [logging.StreamHandler()]
    log.handlers[0].setFormatter(Plain())
    with first():
        run = Run(checked, Console(quiet=rank() > 0))
    train_all(run, begin=lambda: link_logs(run.folder))
    with first():
        if rank() == 0:
            compare(run, sweep_point.command(cfg))
    return run


def _score(run: Run) -> float:
    from kd_lightning.pipeline.run import score

    return score(run)


@_ended()
def main() -> None:
    """Entry point of `kd-train`."""
    register_resolvers()
    import_from_here()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the message is decided here
    with explained(sys.argv[1:]):
        _run()


if __name__ == "__main__":
    main()
