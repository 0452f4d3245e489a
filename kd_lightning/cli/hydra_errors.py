"""Composes configurations, and turns Hydra's errors into one line with the nearest valid key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_lightning.cli.runner import import_from_here
from kd_lightning.config.instantiate import conf_dir, first_line
from kd_lightning.pipeline.resolvers import register_resolvers
from kd_lightning.runtime import errors
from kd_lightning.runtime.errors import ConfigError, KDError, did_you_mean

_PLUGINS = {"hydra/launcher/submitit_slurm": "slurm", "hydra/sweeper/optuna": "sweep"}
"""Settings of Hydra's plugins, and the extra that installs them."""


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of overrides, as `kd-train` does."""
    from hydra import compose, initialize_config_dir

    register_resolvers()
    import_from_here()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@contextmanager
def explained(overrides: Sequence[str]) -> Iterator[None]:
    """Raise Hydra's errors in this block as our own.

    Args:
        overrides: The command line's arguments.

    Raises:
        KDError: In one line; a `ConfigError` for mistakes in the overrides.
    """
    try:
        yield
    except Exception as error:
        ours = explain(error, list(overrides))
        if ours is None:
            raise
        raise ours from error


def explain(error: Exception, overrides: list[str]) -> KDError | None:
    """Convert an error of Hydra, its sweepers or a spawned process into our own.

    Args:
        error: What was raised.
        overrides: The command line's arguments.

    Returns:
        Our error; None if it already is one, or a defect, which keeps its traceback.
    """
    if type(error).__name__ == "ProcessRaisedException":  # from torch: a process's traceback as text
        lines = re.findall(rf"^{KDError.__module__}\.(\w+): (.+)$", str(error), re.MULTILINE)
        return getattr(errors, lines[-1][0])(lines[-1][1]) if lines else None
    if isinstance(error, ValueError) and str(error).startswith("No trials are completed"):  # Optuna's sweeper
        return KDError("every point of this search failed: see the report")
    refusal = _refusal(error, overrides)
    return None if refusal is None else ConfigError(refusal)


def _refusal(error: Exception, overrides: list[str]) -> str | None:
    """Return a line on Hydra's error, with the nearest valid key; None for other errors."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return _no_choice(overrides)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, first_line(error))
    if "Could not override 'model'" in str(error):
        name = next((given.partition("=")[2] for given in overrides if given.startswith("model=")), "NAME")
        return f"model={name}: whose? model@student={name} is the student, model@teacher.network={name} the teacher"
    for plugin, extra in _PLUGINS.items():
        if f"'{plugin}'" in str(error):
            return f"{plugin} needs a package that is not installed: pip install 'kd-lightning[{extra}]'"
    if choice := re.search(r"Could not find '([\w/]+)/(\w+)'", str(error)):
        group, name = choice.groups()
        there = [file.stem for file in (conf_dir() / group).glob("*.yaml")]
        return f"{group}={name}: there is no such choice{did_you_mean(name, there)}"
    known = _known_keys([override for override in overrides if _chooses_group(override)])
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if known and "=" in override and not override.startswith(("+", "-", "hydra")) and key not in known:
            return f"{key}: there is no such key{did_you_mean(key, known)}"
    cause = error.__cause__
    return first_line(error) + (f" ({first_line(cause)})" if isinstance(cause, Exception) else "")


def _unreadable(override: str, reason: str) -> str:
    """Return which argument does not parse, and how to write its value."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is not KEY=VALUE"
    value = value.strip("\"'")
    inner = f"'{value}'" if "'" not in value else '"' + value.replace('"', r"\"") + '"'
    outer = '"' if inner.startswith("'") else "'"
    return (
        f"{override}: cannot be read ({reason}); write a value with special characters as {outer}{key}={inner}{outer}"
    )


def _no_choice(overrides: list[str]) -> str:
    """Return which group got something other than the name of a choice."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        folder = conf_dir() / key.partition("@")[0]
        if key.strip("@") and folder.is_dir() and not (folder / f"{value}.yaml").is_file():
            names = [file.stem for file in folder.glob("*.yaml")]
            return f"{override}: {key} is a group of settings and takes the name of a choice{did_you_mean('', names)}"
    return "one of KEY=VALUE names no key, or gives a group of settings something other than the name of a choice"


def _chooses_group(override: str) -> bool:
    return (conf_dir() / override.partition("=")[0].partition("@")[0]).is_dir()


def _known_keys(groups: list[str]) -> list[str]:
    """Return every key and group that is valid with the selected groups."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            cfg = compose("config", overrides=groups)
        except HydraException:  # the choice of a group is itself wrong
            return []
    choices = [path.name for path in conf_dir().iterdir() if path.is_dir()]
    return [*_flatten(to_dict_unresolved(cfg)), *choices, "model@student", "model@teacher.network",
            "optimizer@teacher.optimizer", "scheduler@teacher.scheduler"]  # fmt: skip


def to_dict_unresolved(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as a plain dictionary with its interpolations as they are written."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _flatten(node: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        yield name
        if isinstance(value, dict):
            yield from _flatten(value, name)
