"""From a composed configuration to objects: the only place that calls `hydra.utils.instantiate`.

Heavy imports (torch and what stands on it) happen when a `_target_` is looked up, not when this file is imported, so
that `kd-train --help` and `--cfg job` stay quick.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_lightning.errors import ConfigError, KDError, did_you_mean

STAGES = ("teacher", "baseline", "distill", "finetune")


def conf_dir() -> Path:
    """Return the configuration folder: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_resolvers() -> None:
    """Make the `${name:...}` functions of conf/ known to OmegaConf."""
    OmegaConf.register_new_resolver("one_minus", one_minus, replace=True)
    OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)
    OmegaConf.register_new_resolver("fused_for", lambda precision: not str(precision).startswith("16"), replace=True)
    OmegaConf.register_new_resolver("tokenizer_of", tokenizer_of, replace=True)


def one_minus(value: Any) -> Any:
    """Return 1 - value, for a number or for the configuration of a schedule.

    >>> one_minus(0.75)
    0.25
    """
    if isinstance(value, Mapping):
        return {"_target_": "kd_lightning.schedules.OneMinus", "value": to_dict(value)}
    return 1.0 - float(value)


def fast_precision() -> str:
    """Return `bf16-mixed` where the hardware multiplies bfloat16 natively, else `32-true`."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def tokenizer_of(role: str, *, _root_: DictConfig) -> str | None:
    """Return the tokenizer that belongs to the student or the teacher.

    It is the one saved beside a finished teacher (`teacher.checkpoint`), or the one that a pretrained network's `name`
    brings. A network without one reads the other's tokens, and `minilm` where neither has its own.
    """
    checkpoint = OmegaConf.select(_root_, "teacher.checkpoint")
    if checkpoint is not None:
        saved = [Path(checkpoint, stage, "tokenizer") for stage in ("teacher", "")]
        teacher = next((str(folder) for folder in saved if folder.is_dir()), str(checkpoint))
    else:
        teacher = OmegaConf.select(_root_, "teacher.network.name")
    if role == "teacher":
        return teacher
    return OmegaConf.select(_root_, "student.name") or teacher or "minilm"


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
        if isinstance(error.__cause__, KDError):  # what the user should read, without Hydra's wrapping
            raise error.__cause__ from None
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
        raise ConfigError(f"_target_ '{target}' cannot be imported ({_first_line(error)}){near}") from error
    return found


def parameters(target: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
    """Return the parameters of a function or class by name, as (type, required), through `**kwargs` up the bases."""
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
                found.setdefault(name, (hints.get(name, Any), parameter.default is parameter.empty))
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    return found


def validate(cfg: DictConfig) -> None:
    """Refuse, before any work, unknown keys, wrong types, missing values and combinations that cannot be.

    Raises:
        ConfigError: Names the key, what was given, what was expected and the nearest valid name.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} needs a value: kd-train {missing[0]}=...")
    settings = to_dict(cfg)
    _check_run(settings)
    for path, node in _targets(settings):
        _check_node(path, node)


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _targets(value, f"{path}[{i}]")


def _check_node(path: str, node: dict[str, Any]) -> None:
    takes = parameters(lookup(node["_target_"]))
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_"):
            continue
        if key not in takes:
            raise ConfigError(f"{path}.{key}: {node['_target_']} takes no '{key}'{did_you_mean(key, takes)}")
        if not any(True for _ in _targets(value)):  # nested objects are checked as nodes of their own
            _check_type(f"{path}.{key}", value, takes[key][0])


def _check_type(key: str, value: Any, expected: Any) -> None:
    from jsonargparse import ArgumentError, ArgumentParser

    if expected is Any or expected is inspect.Parameter.empty or value is None:
        return
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=expected)
    except ValueError:  # a type jsonargparse cannot check, such as a protocol
        return
    try:
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r} is not {_type_name(expected)}") from error


def _type_name(expected: Any) -> str:
    name = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}.get(
        name, f"a {name}"
    )


def _check_run(cfg: dict[str, Any]) -> None:
    """Check the root keys, which belong to no class."""
    for key, expected in ROOT_TYPES.items():
        _check_type(key, cfg.get(key), expected)
    for key in ("temperature", "alpha"):
        if isinstance(cfg[key], bool | str) or not isinstance(cfg[key], int | float | dict):
            raise ConfigError(f"{key}={cfg[key]!r} is neither a number nor a schedule (see kd_lightning/schedules.py)")
    temperature, alpha = cfg["temperature"], cfg["alpha"]
    if isinstance(temperature, int | float) and not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature={temperature} must be above 0")
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} must be between 0 (labels only) and 1 (teacher only)")
    for key in ("seeds", "validations", "checkpoint_every_n_steps"):
        if cfg[key] < 1:
            raise ConfigError(f"{key}={cfg[key]} must be at least 1")
    stages = cfg["stages"]
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"stages: there is no stage '{stage}'{did_you_mean(stage, STAGES)}")
    if stages != sorted(set(stages), key=STAGES.index) or not stages:
        raise ConfigError(f"stages={stages} must be some of {list(STAGES)}, in this order, each once")
    if "finetune" in stages and "distill" not in stages:
        raise ConfigError("stages: finetune goes on from the distilled student, so it needs distill before it")
    if cfg["teacher"]["cache"] not in ("auto", "off"):
        raise ConfigError(f"teacher.cache={cfg['teacher']['cache']!r} must be auto or off")
    if cfg["resume"] not in ("auto", "never"):
        raise ConfigError(f"resume={cfg['resume']!r} must be auto or never")
    _check_trainer(cfg["trainer"], cfg["teacher"]["trainer"])


def _check_trainer(*trainers: dict[str, Any]) -> None:
    merged = {**trainers[0]}
    for trainer in trainers:
        merged.update(trainer)
        if merged.get("accelerator") == "cpu" and str(merged.get("precision")) in ("16-mixed", "16-true"):
            raise ConfigError("trainer.precision=16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true")
        if merged.get("max_steps", -1) in (-1, None) and merged.get("max_epochs") in (-1, None):
            raise ConfigError(
                "trainer.max_epochs or trainer.max_steps must be set: the same budget goes to the baseline"
            )


ROOT_TYPES: dict[str, Any] = {
    "name": str, "run_dir": str, "stages": list[str], "seed": int, "seeds": int, "resume": str,
    "validations": int, "checkpoint_every_n_steps": int,
}  # fmt: skip


def place(cfg: DictConfig) -> None:
    """In a sweep, give the point its own folder, and refuse what would run the sweep once per process.

    Raises:
        ConfigError: Lightning's subprocess launcher in a sweep; names the strategies that do work.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return
    cfg.run_dir = hydra.runtime.output_dir
    strategy = str(cfg.trainer.get("strategy", "auto"))
    if strategy in ("ddp", "fsdp", "ddp_find_unused_parameters_true"):
        raise ConfigError(
            f"trainer.strategy={strategy} re-launches the command once per device, and in a sweep (-m) each of them "
            "would run the whole sweep: use trainer.strategy=ddp_spawn here, or a launcher with one task per device"
        )


def explain(error: Exception, overrides: list[str]) -> str | None:
    """Turn Hydra's refusal of the command line into one line that names the nearest valid key.

    Args:
        error: What was raised.
        overrides: The command line's arguments.

    Returns:
        The line; None when the error is no refusal but a defect, which deserves its traceback.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    known = _known_keys([override for override in overrides if _chooses_group(override)])
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if known and "=" in override and not override.startswith(("+", "-", "hydra")) and key not in known:
            return f"{key}: there is no such key{did_you_mean(key, known)}"
    cause = error.__cause__
    return _first_line(error) + (f" ({_first_line(cause)})" if isinstance(cause, Exception) else "")


def _chooses_group(override: str) -> bool:
    return (conf_dir() / override.partition("=")[0].partition("@")[0]).is_dir()


def _known_keys(groups: list[str]) -> list[str]:
    """Return every key and group that the command line could have named, under the groups it chose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            cfg = compose("config", overrides=groups)
        except HydraException:  # the choice of a group is itself what is wrong, and Hydra's message lists the choices
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
