"""What a run's files may name: a folder is data, and code only if the user trusts it.

`_target_` of a `model.json` or `config.yaml` is imported and called. Without the user's word it reaches the networks
and data of this package, modules of torch.nn, and classes of networks and configs of transformers and timm: nothing
that deletes, loads pickles or runs what it is given. What the user's own configuration names is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from kd_lightning.runtime.errors import ConfigError

_PACKAGES = ("kd_lightning.models.", "kd_lightning.data.", "torch.nn.", "transformers.", "timm.")
_all: ContextVar[bool] = ContextVar("trust_all", default=False)
_own: set[str] = set()  # what the user's configuration of this process names


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Let files read in this block run code, if `trust`."""
    before = _all.set(trust or _all.get())
    try:
        yield
    finally:
        _all.reset(before)


def trusts_all() -> bool:
    """Return whether files may run code now."""
    return _all.get()


def trust_own(settings: Any) -> None:
    """Trust the classes of the user's own configuration when loading runs in this process."""
    _own.update(named(settings))


def named(settings: Any) -> set[str]:
    """Return every `_target_` in nested settings."""
    if isinstance(settings, Mapping):
        here = {str(settings["_target_"])} if "_target_" in settings else set()
        return here.union(*map(named, settings.values()))
    return set().union(*map(named, settings)) if isinstance(settings, list | tuple) else set()


def check_saved(settings: Any, file: Path) -> None:
    """Refuse settings from a file that would run code nobody has agreed to.

    Raises:
        ConfigError: They name something else than the parts of networks and data listed above, or hold `${...}`, which
            reads the environment; saved settings have none.
    """
    if trusts_all():
        return
    if text := _interpolation(settings):
        raise ConfigError(f"{file} holds {text!r}: files of a run hold no ${{...}}; replace it by its value")
    for target in sorted(named(settings) - _own):
        if not _harmless(target):
            raise ConfigError(
                f"{file} would run {target!r}, which is no network or data of this package, torch.nn, transformers or "
                "timm: if you trust whoever made it, add --trust (in Python: load_run(..., trust=True); with kd-train: "
                "name the class in your own configuration)"
            )


def build_saved(settings: Any, file: Path) -> Any:
    """Build what a file of a run or export describes.

    Raises:
        ConfigError: As `check_saved`, or it describes nothing.
    """
    from kd_lightning.config.instantiate import build

    if not isinstance(settings, dict) or not isinstance(settings.get("_target_"), str):
        raise ConfigError(f"{file} describes no network or data: it has no _target_")
    check_saved(settings, file)
    return build(settings)


def _interpolation(settings: Any) -> str | None:
    if isinstance(settings, str):
        return settings if "${" in settings else None
    inside = list(settings.values()) if isinstance(settings, Mapping) else settings
    inside = inside if isinstance(inside, list | tuple) else []
    return next((found for value in inside if (found := _interpolation(value))), None)


def _harmless(target: str) -> bool:
    """Return whether a name is that of a network, a config or data that a file may name."""
    from kd_lightning.models.rebuild import is_description

    if is_description({"_target_": target}):
        return True
    if not target.startswith(_PACKAGES) or not all(part.isidentifier() for part in target.split(".")):
        return False
    from lightning import LightningDataModule
    from torch import nn
    from transformers import PreTrainedConfig

    from kd_lightning.config.instantiate import lookup

    try:
        found: Any = lookup(target)
    except ConfigError:
        return False
    home = f"{getattr(found, '__module__', '')}."
    root = next(package for package in _PACKAGES if target.startswith(package))
    kind = LightningDataModule if root == "kd_lightning.data." else (nn.Module, PreTrainedConfig)
    return isinstance(found, type) and issubclass(found, kind) and home.startswith(root)
