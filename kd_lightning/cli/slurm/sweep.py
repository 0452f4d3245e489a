"""The points that a command line sweeps over, as `kd-train -m` expands it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.cli.hydra_errors import explained
from kd_lightning.config.instantiate import conf_dir
from kd_lightning.config.sweep import GRID
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.runtime.errors import ConfigError

Parser = Callable[[list[str]], list[Any]]
"""Parses overrides to Hydra's objects."""


@dataclass
class Sweep:
    """A sweep, expanded.

    Attributes:
        points: The overrides of each point, all of them.
        hydra: The overrides of Hydra's own settings (`hydra.sweep.dir=...`), but for those of launcher and sweeper.
        config: The first point's configuration, with Hydra's own under `hydra`.
    """

    points: list[list[str]]
    hydra: list[str]
    config: Any

    @property
    def folder(self) -> Path:
        """The folder of its points' folders."""
        return Path(self.config.hydra.sweep.dir).absolute()


def expand(overrides: Sequence[str], *defaults: str) -> Sweep:
    """Expand overrides as `kd-train -m` would, and compose every point.

    Args:
        overrides: As on kd-train's command line: `experiment=quickstart temperature=1,2,4`.
        defaults: Further overrides with lower priority: `hydra/launcher=slurm`.

    Raises:
        ConfigError: Hydra refuses them, or they select a sweeper whose points are not known beforehand.
    """
    from hydra import compose

    with _hydra(overrides) as parse:
        given = parse([*defaults, *overrides])
        own = [override.input_line for override in given if override.is_hydra_override()]
        task = [override.input_line for override in given if not override.is_hydra_override()]
        whole = compose("config", [*own, *_product(parse, task)[0]], return_hydra_config=True)
        if not _is_grid(whole.hydra.sweeper):
            raise ConfigError(
                f"{whole.hydra.sweeper._target_.rpartition('.')[2]} chooses its points on the fly, and a chain of jobs "
                "needs to know them: run kd-train -m hydra/launcher=slurm instead"
            )
        points = _product(parse, task, whole.hydra.sweeper.params)
        for point in points:
            compose("config", point)
    kept = [line for line in own if not line.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher", "hydra/sw"))]
    return Sweep(points, kept, whole)


def recorded(multirun: Path) -> list[list[str]]:
    """Expand Hydra's record of a multirun; nothing if a sweeper chose its points."""
    from omegaconf import OmegaConf

    hydra = OmegaConf.load(multirun).hydra
    if not _is_grid(hydra.sweeper):
        return []
    with _hydra(hydra.overrides.task) as parse:
        return _product(parse, hydra.overrides.task, hydra.sweeper.params)


def _is_grid(sweeper: Any) -> bool:
    return str(sweeper._target_).rpartition(".")[2] == GRID


@contextmanager
def _hydra(overrides: Sequence[str]) -> Iterator[Parser]:
    """Initialise Hydra on conf/, yield its parser of overrides, and report its errors in one line."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    register_resolvers()
    with explained(overrides), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides


def _product(parse: Parser, task: Sequence[str], params: Mapping[str, Any] | None = None) -> list[list[str]]:
    """Return every combination of the values in overrides and a sweeper's params."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    given = parse([*(f"{key}={value}" for key, value in (params or {}).items()), *task])
    points: list[list[str]] = BasicSweeper.split_arguments(given, max_batch_size=None)[0]
    return points


def varied(points: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the overrides of each point that not all points have.

    >>> varied([["seed=1", "alpha=0.5"], ["seed=1", "alpha=0.9"]])
    [['alpha=0.5'], ['alpha=0.9']]
    """
    common = set(points[0]).intersection(*points[1:]) if points else set()
    return [[override for override in point if override not in common] for point in points]
