"""`kd-train`: compose a configuration with Hydra and run its stages."""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from kd_lightning.cli.hydra_errors import explained
from kd_lightning.cli.runner import begin, command, import_from_here
from kd_lightning.config.instantiate import conf_dir, in_sweep, place
from kd_lightning.pipeline import sweep_point
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.pipeline.status import LOCK
from kd_lightning.pipeline.sweep_point import recorded
from kd_lightning.runtime.borders import Plain
from kd_lightning.runtime.errors import ConfigError, Interrupted
from kd_lightning.runtime.files import Busy, alone
from kd_lightning.runtime.processes import first, join, rank
from kd_lightning.runtime.signals import watch
from kd_lightning.runtime.slurm_logs import link_logs

if TYPE_CHECKING:
    from kd_lightning.pipeline.context import Run


DRY = "--dry-run"
_SWEEPS = re.compile(r"-[hr]*m[hrm]*|\+{0,2}sweep=(?!null$).*|\+{0,2}hydra\.mode=.*MULTIRUN.*", re.DOTALL)
"""Words that make Hydra start a sweep."""
_ended = partial(command, "kd-train", "nothing was being trained; the same command goes on", first_only=True)


_composed = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")


@_composed
def _run(cfg: DictConfig) -> float:
    """Run a composed configuration; return the best validation score, averaged over seeds."""
    if in_sweep():
        return _point(cfg)
    with _ended(), explained(sys.argv[1:]):  # here, since Hydra adds lines to exceptions from a job
        run = _train(cfg)
        return _aim(run, _score(run))


@_composed
def _look_ahead(cfg: DictConfig) -> None:
    """Print what a composed configuration would do."""
    with _ended(), explained(sys.argv[1:]):
        if in_sweep():
            raise ConfigError(f"{DRY} is of one run, and this is a point of a sweep: leave out what makes several")
        run = _opened(cfg)
        from kd_lightning.pipeline.dry_run import look_ahead, show

        show(run, look_ahead(run))


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


def _opened(cfg: DictConfig) -> Run:
    """Check a configuration and read its data, in each of the command's processes."""
    from rich.console import Console

    from kd_lightning.pipeline.validation import validate

    watch()
    checked = validate(cfg)
    join()
    from kd_lightning.pipeline.context import Run

    begin()
    log = logging.getLogger("kd_lightning")  # notices about data and models, as plain lines
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    log.handlers = [logging.StreamHandler()]
    log.handlers[0].setFormatter(Plain())
    with first():
        return Run(checked, Console(quiet=rank() > 0))


def _train(cfg: DictConfig) -> Run:
    run = _opened(cfg)
    from kd_lightning.pipeline.compare import compare
    from kd_lightning.pipeline.run import train_all

    with ExitStack() as held:
        train_all(run, partial(_begin, run.folder, held), sweep_point.command(cfg))
        with first():
            if rank() == 0:
                compare(run, sweep_point.command(cfg))
    return run


def _begin(folder: Path, held: ExitStack) -> None:
    """Link the logs of a SLURM job, and hold the run's lock, by which `kd-status` tells that it runs."""
    link_logs(folder)
    if rank() == 0:
        with suppress(Busy):  # another command trains the same run; stages wait for each other
            held.enter_context(alone(folder / LOCK, print, wait=False))


def _score(run: Run) -> float:
    from kd_lightning.pipeline.run import score

    return score(run)


def _of_one_run(words: list[str]) -> list[str]:
    """Return a dry run's command line, by which Hydra makes one run, whatever a user's own file sets.

    Raises:
        ConfigError: One of its words makes several.
    """
    for word in words[1:]:
        if _SWEEPS.fullmatch(word) or (len(word) > 2 and "--multirun".startswith(word)):  # argparse completes options
            raise ConfigError(f"{DRY} is of one run, and {word} makes several: leave it out, and give one value each")
    last = max((place for place, word in enumerate(words) if not word.startswith("-") and "=" in word), default=None)
    place = len(words) if last is None else last + 1  # argparse takes overrides that stand together
    return [*words[:place], "hydra.mode=RUN", *words[place:]]


@_ended()
def main() -> None:
    """Entry point of `kd-train`."""
    register_resolvers()
    import_from_here()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the message is decided here
    if dry := DRY in sys.argv:
        sys.argv = _of_one_run([word for word in sys.argv if word != DRY])
    with explained(sys.argv[1:]):
        _look_ahead() if dry else _run()


if __name__ == "__main__":
    main()
