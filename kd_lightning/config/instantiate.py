"""From a composed configuration to objects: the only place that calls `hydra.utils.instantiate`.

Heavy imports (torch and what stands on it) happen when a `_target_` is looked up, not when this file is imported, so
that `kd-train --help` and `--cfg job` stay quick.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_lightning.runtime.errors import ConfigError, KDError, did_you_mean


def conf_dir() -> Path:
    """Return the configuration folder: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def build(node: DictConfig | dict[str, Any], **given: Any) -> Any:
    """Instantiate a `_target_` node.

    Args:
        node: The node; nested `_target_` nodes are built too.
        given: Arguments from the run (number of classes, vocabulary size, the teacher), each used only where the
            target takes it and the node does not set it. A `None` in the node counts as not set.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    settings: dict[str, Any] = to_dict(node) if isinstance(node, DictConfig) else dict(node)
    takes = parameters(lookup(settings["_target_"]))
    extra = {key: value for key, value in given.items() if key in takes and settings.get(key) is None}
    settings = {key: value for key, value in settings.items() if key not in extra}
    try:
        return instantiate(settings, **extra, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, KDError):  # what the user should read, without Hydra's wrapping
            raise cause from None
        if isinstance(cause, ValueError):
            inside = re.search(r"full_key: (\S+)", str(error))
            raise ConfigError(f"{inside[1] if inside else settings['_target_']}: {cause}") from error
        if isinstance(cause, ModuleNotFoundError):
            raise ConfigError(f"{settings['_target_']} needs a package that is missing: {first_line(cause)}") from error
        raise


def to_dict(node: Any) -> Any:
    """Return a configuration node as plain, resolved Python values."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=False) if OmegaConf.is_config(node) else node


def lookup(target: str) -> Callable[..., Any]:
    """Import what a `_target_` names.

    Raises:
        ConfigError: There is no such thing, with the nearest names in its module.
    """
    from hydra.utils import get_object

    try:
        found: Callable[..., Any] = get_object(target)
    except Exception as error:
        module, _, name = target.rpartition(".")
        try:
            near = did_you_mean(name, [n for n in dir(get_object(module)) if not n.startswith("_")])
        except Exception:
            near = ""
        raise ConfigError(f"_target_ '{target}' cannot be imported ({first_line(error)}){near}") from error
    return found


def parameters(target: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
    """Return a callable's parameters by name, as (type, required), following `**kwargs` to bases."""
    found: dict[str, tuple[Any, bool]] = {}
    constructors: list[Any] = [target]
    if inspect.isclass(target):
        constructors = [vars(base)["__init__"] for base in inspect.getmro(target) if "__init__" in vars(base)]
    for function in constructors:
        signature = inspect.signature(function)
        try:
            hints = typing.get_type_hints(inspect.unwrap(function))
        except NameError:  # annotations that exist only for type checkers
            hints = {}
        for name, parameter in signature.parameters.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                hint = hints.get(name, Any)
                if parameter.default is None and hint is not Any:
                    hint = typing.Optional[hint]  # noqa: UP045 - any hint; older annotations leave it unsaid
                found.setdefault(name, (hint, parameter.default is parameter.empty))
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    return found


def processes(trainer: Mapping[str, Any]) -> int:
    """Return how many processes a trainer's settings start."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, list):
        count = len(devices)
    elif devices in ("auto", -1, "-1"):
        import torch

        count = torch.cuda.device_count() if trainer.get("accelerator") != "cpu" else 1
    else:
        try:
            count = int(devices)
        except (TypeError, ValueError):
            raise ConfigError(
                f"trainer.devices={devices!r} is neither a number of devices, a list of them, nor auto"
            ) from None
    return max(count, 1) * int(trainer.get("num_nodes", 1))


def in_sweep() -> bool:
    """Return whether this is a point of a Hydra multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def place(cfg: DictConfig) -> None:
    """In a sweep, give the point a folder of its own, and all points one for what they have in common."""
    from hydra.core.hydra_config import HydraConfig

    if in_sweep():
        hydra = HydraConfig.get()
        if cfg.shared_dir is None:
            cfg.shared_dir = str(Path(hydra.runtime.cwd, hydra.sweep.dir, "shared"))
        cfg.run_dir = hydra.runtime.output_dir


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
