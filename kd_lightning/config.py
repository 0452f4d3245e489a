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
    _check_keys(settings)
    _check_values(settings)
    _check_schedules(settings)
    for path, node in _targets(settings):
        _check_node(path, node)
    _check_trainers(settings)


_ROOT = {
    "name": str, "run_dir": str, "stages": list[str], "seed": int, "seeds": int, "resume": str, "temperature": Any,
    "alpha": Any, "validations": int, "checkpoint_every_n_steps": int, "teacher": dict, "finetune": dict,
}  # fmt: skip
_GROUPS = ("data", "student", "distillation", "optimizer", "scheduler", "trainer", "callbacks", "logger")
_TEACHER = {
    "checkpoint": str, "cache": str, "batch_size": int, "trainer": dict, "validations": int, "network": dict,
    "optimizer": dict, "scheduler": dict,
}  # fmt: skip
_FINETUNE = {"lr": float, "max_epochs": int}
_OURS = (
    "callbacks", "logger", "default_root_dir", "num_sanity_val_steps", "use_distributed_sampler",
    "enable_model_summary", "enable_progress_bar", "val_check_interval", "check_val_every_n_epoch",
)  # fmt: skip
"""Trainer arguments that the pipeline sets, and would set over what is given."""


def _check_keys(cfg: dict[str, Any]) -> None:
    """Check names and types of the keys that belong to no class."""
    groups: dict[str, Any] = dict.fromkeys(_GROUPS, dict)
    for prefix, node, known in (
        ("", cfg, _ROOT | groups), ("teacher.", cfg["teacher"], _TEACHER), ("finetune.", cfg["finetune"], _FINETUNE),
    ):  # fmt: skip
        for key, value in node.items():
            if key not in known:
                raise ConfigError(f"{prefix}{key}: there is no such key{did_you_mean(str(key), known)}")
            if value is None and f"{prefix}{key}" != "teacher.checkpoint":
                raise ConfigError(f"{prefix}{key} needs a value")
            _check_type(f"{prefix}{key}", value, known[key])


def _check_values(cfg: dict[str, Any]) -> None:
    """Check the values of those keys, and what they say together."""
    at_least = {
        "seed": 0, "seeds": 1, "validations": 1, "checkpoint_every_n_steps": 1, "teacher.batch_size": 1,
        "teacher.validations": 1, "finetune.max_epochs": 1,
    }  # fmt: skip
    for path, least in at_least.items():
        group, _, key = path.rpartition(".")
        value = (cfg[group] if group else cfg)[key]
        if value < least:
            raise ConfigError(f"{path}={value} must be at least {least}")
    stages = cfg["stages"]
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"stages: there is no stage '{stage}'{did_you_mean(stage, STAGES)}")
    if stages != sorted(set(stages), key=STAGES.index) or not stages:
        raise ConfigError(f"stages={stages} must be some of {list(STAGES)}, in this order, each once")
    if "finetune" in stages and "distill" not in stages:
        raise ConfigError("stages: finetune goes on from the distilled student, so it needs distill before it")
    for path, choices in (("teacher.cache", ("auto", "off")), ("resume", ("auto", "never"))):
        group, _, key = path.rpartition(".")
        value = (cfg[group] if group else cfg)[key]
        if value not in choices:
            raise ConfigError(f"{path}={value!r} must be {' or '.join(choices)}")


def _check_schedules(cfg: dict[str, Any]) -> None:
    """Check temperature and alpha, and where they are schedules, their values all along the training."""
    for key, low, high in (("temperature", 0.0, math.inf), ("alpha", 0.0, 1.0)):
        given = cfg[key]
        if isinstance(given, bool | str) or not isinstance(given, int | float | dict):
            raise ConfigError(f"{key}={given!r} is neither a number nor a schedule (see kd_lightning/schedules.py)")
        schedule = build(given) if isinstance(given, dict) else lambda _, value=given: value
        for value in (schedule(step / 100) for step in range(101)):
            if not low <= value <= high or not math.isfinite(value) or (key == "temperature" and value == 0):
                wanted = "above 0" if key == "temperature" else "between 0 (labels only) and 1 (teacher only)"
                raise ConfigError(f"{key}={value:g} must be {wanted}")


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
    if not path.startswith(_FILLED_IN) and not node.get("_partial_"):
        for key, (_, required) in takes.items():
            if required and key not in node:
                raise ConfigError(f"{path}.{key} needs a value: {node['_target_']} cannot do without it")


_FILLED_IN = ("student", "teacher.network", "logger")
"""Nodes that the pipeline gives further arguments (number of classes, vocabulary, teacher; the folder to log in)."""


def _check_type(key: str, value: Any, expected: Any) -> None:
    from jsonargparse import ArgumentError, ArgumentParser

    if expected in (Any, dict, inspect.Parameter.empty) or key == "teacher.checkpoint":
        return
    if value is None and expected in (int, float, bool, str):
        raise ConfigError(f"{key}=null is not {_type_name(expected)}")
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
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(expected) or "a " + str(getattr(expected, "__name__", expected)).replace("typing.", "")


def _check_trainers(cfg: dict[str, Any]) -> None:
    """Check the trainer's settings for the students, and as the teacher's own change them."""
    import torch

    _check_node("teacher.trainer", {"_target_": cfg["trainer"]["_target_"], **cfg["teacher"]["trainer"]})
    for path, trainer in (("trainer", cfg["trainer"]), ("teacher.trainer", cfg["trainer"] | cfg["teacher"]["trainer"])):
        for key in _OURS:
            if key in trainer:
                raise ConfigError(f"{path}.{key} is set by the pipeline; see callbacks, logger and validations")
        if trainer.get("accelerator") == "cpu" and str(trainer.get("precision")) in ("16-mixed", "16-true"):
            raise ConfigError(f"{path}.precision=16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true")
        steps, epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
        if steps in (-1, None) and epochs in (-1, None):
            raise ConfigError(f"{path}.max_epochs or {path}.max_steps must be set: the baseline gets the same budget")
        for key, value in (("max_steps", steps), ("max_epochs", epochs)):
            if value is not None and value != -1 and value < 1:
                raise ConfigError(f"{path}.{key}={value} must be at least 1, or -1 for no limit")
        strategy = str(trainer.get("strategy", "auto"))
        if processes(trainer) > 1 and not strategy.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
            raise ConfigError(
                f"{path}.strategy={strategy} with {processes(trainer)} processes would start the whole command again "
                "in each of them: use strategy=ddp_spawn (trainer=ddp)"
            )
        if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigError(f"{path}.accelerator={trainer['accelerator']} needs a GPU, and torch finds none here")


def processes(trainer: Mapping[str, Any]) -> int:
    """Return how many processes a trainer's settings start."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, list):
        count = len(devices)
    elif devices in ("auto", -1, "-1"):
        import torch

        count = torch.cuda.device_count() if trainer.get("accelerator") != "cpu" else 1
    else:
        count = int(devices)
    return max(count, 1) * int(trainer.get("num_nodes", 1))


def place(cfg: DictConfig) -> None:
    """In a sweep, give the point a folder of its own."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        cfg.run_dir = hydra.runtime.output_dir


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
