"""What is refused before any work: unknown keys, wrong types and values, combinations that cannot be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.instantiate import build, first_line, lookup, parameters, processes, to_dict
from kd_lightning.config.numbers import check_numbers
from kd_lightning.config.trust import trust_own
from kd_lightning.pipeline.trainer_checks import check_trainers, shards, try_trainers
from kd_lightning.runtime.errors import ConfigError, KDError, did_you_mean
from kd_lightning.runtime.files import check_place
from kd_lightning.runtime.fingerprints import differences
from kd_lightning.teachers.ensemble import Combine, shares_of
from kd_lightning.teachers.frozen import Precision
from kd_lightning.training.loss_balancing import make_balance
from kd_lightning.training.objective import Objective
from kd_lightning.training.run_folder import check_stage, read_config

STAGES = ("teacher", "baseline", "distill", "finetune")


def validate(cfg: DictConfig) -> None:
    """Refuse, before any work, unknown keys, wrong types, missing values and combinations that cannot be.

    Raises:
        ConfigError: Names the key, what was given, what was expected and the nearest valid name.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} needs a value: kd-train {missing[0]}=...")
    settings = to_dict(cfg)
    trust_own(settings)
    name = Path(str(settings.get("name")))
    if name.is_absolute() or ".." in name.parts:
        raise ConfigError(f"name={name}: a name is that of a folder inside runs/; for another place set run_dir=FOLDER")
    _check_keys(settings)
    _check_terms(settings)
    _check_schedules(settings)
    check_numbers(settings)
    _check_values(settings)
    for path, node in _targets(settings):
        _check_node(path, node)
    _check_node("teacher.trainer", {"_target_": settings["trainer"]["_target_"], **settings["teacher"]["trainer"]})
    check_trainers(settings)
    _check_loss(settings)
    _check_places(settings)
    try_trainers(settings)


_ROOT = {
    "name": str, "run_dir": str, "shared_dir": str | None, "stages": list[str], "seed": int, "seeds": int,
    "resume": str, "temperature": Any, "alpha": Any, "balance": str, "validations": int,
    "checkpoint_every_n_steps": int, "compile": bool, "teacher": dict,
    "assistants": list[dict[str, Any]], "peers": list[dict[str, Any]], "finetune": dict,
    "tasks": dict[str, dict[str, Any]],
}  # fmt: skip
CACHE_MODES = ("auto", "off", "require", "refresh")
_GROUPS = ("data", "student", "distillation", "optimizer", "scheduler", "trainer", "callbacks", "logger")
_TEACHER = {
    "checkpoint": str | list[str] | None, "seed": int, "seeds": int, "folds": int, "calibrate": bool,
    "combine": Combine, "weights": list[float] | Literal["learned", "confidence"] | None, "ema": float | None,
    "cache": str, "cache_dtype": Literal["float32", "float16", "bfloat16"],
    "cache_top_k": int | None, "cache_views": int, "precision": Precision, "features": list[str],
    "answer_batch_size": int, "device": str | None, "compile": bool, "sharded": bool, "batch_size": int,
    "trainer": dict, "validations": int, "network": dict, "optimizer": dict, "scheduler": dict,
}  # fmt: skip
_FINETUNE = {"lr": float, "max_epochs": int}
_TASK = {"weight": float, "distillation": dict, "teacher": dict}


def _check_keys(cfg: dict[str, Any]) -> None:
    """Check names and types of the keys that belong to no class."""
    groups: dict[str, Any] = dict.fromkeys(_GROUPS, dict)
    _check_group("", cfg, _ROOT | groups)
    _check_group("teacher.", cfg["teacher"], _TEACHER)
    _check_group("finetune.", cfg["finetune"], _FINETUNE)
    for name, task in cfg["tasks"].items():
        _check_group(f"tasks.{name}.", task, _TASK, whole=False)
        _check_group(f"tasks.{name}.teacher.", task.get("teacher", {}), _TEACHER, whole=False)


def _check_group(prefix: str, node: dict[str, Any], known: dict[str, Any], whole: bool = True) -> None:
    """Check a node's keys: none unknown, and unless it only overrides others (`whole`) none missing."""
    for key, value in node.items():
        if key not in known:
            raise ConfigError(f"{prefix}{key}: there is no such key{did_you_mean(str(key), known)}")
        if value is None and NoneType not in get_args(known[key]):
            raise ConfigError(f"{prefix}{key} needs a value")
        if known[key] is dict and not isinstance(value, dict):
            raise ConfigError(f"{prefix}{key}={value!r} is no group of keys; to choose one: {_choice(prefix + key)}")
        _check_type(f"{prefix}{key}", value, known[key])
    if whole and (lacking := [key for key in known if key not in node]):
        raise ConfigError(f"{prefix}{lacking[0]} was removed (~{prefix}{lacking[0]}), and no run can do without it")


def _choice(path: str) -> str:
    """Return how a node is chosen on the command line."""
    if path in ("student", "teacher.network"):
        return f"model@{path}=NAME"
    group, _, name = path.rpartition(".")
    return f"{name}@{path}=NAME" if group else f"{path}=NAME"


def _check_values(cfg: dict[str, Any]) -> None:
    """Check the values of those keys, and what they say together."""
    at_least = {
        "seed": 0, "seeds": 1, "validations": 1, "checkpoint_every_n_steps": 1, "teacher.batch_size": 1,
        "teacher.seed": 0, "teacher.seeds": 1, "teacher.folds": 1, "teacher.validations": 1,
        "teacher.answer_batch_size": 1, "teacher.cache_views": 1, "finetune.max_epochs": 1,
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
    make_balance(cfg["balance"], [])  # refuses an unknown policy
    if cfg["balance"] == "gradnorm" and shards(cfg["trainer"]):
        raise ConfigError("balance=gradnorm compares whole gradients, and trainer=fsdp shards them: use fixed")
    if cfg["resume"] not in ("auto", "never"):
        raise ConfigError(f"resume={cfg['resume']!r} must be auto or never")
    _check_device(cfg["teacher"]["device"])
    checkpoint, weights = cfg["teacher"]["checkpoint"], cfg["teacher"]["weights"]
    _check_folds(cfg["teacher"])
    members = number_of_teachers(cfg["teacher"])
    if checkpoint == []:
        raise ConfigError("teacher.checkpoint=[] names no teacher: give one, a list of several, or null")
    if checkpoint is not None and cfg["teacher"]["seeds"] > 1:
        raise ConfigError(
            f"teacher.seeds={cfg['teacher']['seeds']} are to be trained, and teacher.checkpoint to be loaded"
        )
    if weights is not None and members == 1:
        raise ConfigError(
            "teacher.weights are those of an ensemble's members: give teacher.checkpoint a list of them, or set "
            "teacher.seeds"
        )
    if members > 1 and weights != "learned":
        shares_of(weights, members, cfg["teacher"]["combine"])
    mode = cfg["teacher"]["cache"]
    if mode not in CACHE_MODES and ("/" not in mode or "://" in mode):
        raise ConfigError(
            f"teacher.cache={mode!r} is neither a mode nor a path on this machine (which has a slash)"
            f"{did_you_mean(mode, CACHE_MODES)}"
        )
    _check_schemes(cfg)
    _check_tasks(cfg)
    _check_sharded(cfg)


def _check_device(name: str | None) -> None:
    """Check that a teacher can be put on a device, and can answer there."""
    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"teacher.device={name!r} is no device, such as cuda:1") from error
    if device.type == "meta":
        raise ConfigError("teacher.device=meta holds no numbers: give a device that computes, such as cuda:1")
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise ConfigError(f"teacher.device={name}: torch finds {there or 'no'} GPU{'s' * (there != 1)} here")
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # each backend refuses with an exception of its own
        raise ConfigError(f"teacher.device={name}: this machine has none ({first_line(error)})") from error


def _check_places(cfg: dict[str, Any]) -> None:
    """Check that files can be written where they are to go."""
    places = {"run_dir": cfg["run_dir"], "shared_dir": cfg["shared_dir"]}
    if cfg["teacher"]["cache"] not in CACHE_MODES:
        places["teacher.cache"] = cfg["teacher"]["cache"]
    for key, place in places.items():
        if place is not None:
            check_place(Path(place).expanduser(), f"{key}={place}")


def number_of_teachers(teacher: dict[str, Any]) -> int:
    """Return how many answer together, by the keys below `teacher`."""
    given = teacher["checkpoint"]
    return len(given) if isinstance(given, list) else int(teacher["folds"]) * int(teacher["seeds"])


def _check_folds(teacher: dict[str, Any]) -> None:
    """Check what a cross-fitted teacher excludes."""
    folds = teacher["folds"]
    if folds == 1:
        return
    excluded = {
        "teacher.checkpoint": teacher["checkpoint"] is not None, "teacher.seeds": teacher["seeds"] > 1,
        "teacher.ema": teacher["ema"] is not None, "teacher.weights": teacher["weights"] is not None,
        "teacher.features": bool(teacher["features"]),
    }  # fmt: skip
    if wrong := [key for key, given in excluded.items() if given]:
        raise ConfigError(
            f"teacher.folds={folds} trains that many teachers, each without a fold, whose logits alone are read: "
            f"leave out {', '.join(wrong)}"
        )


def _check_tasks(cfg: dict[str, Any]) -> None:
    """Check the keys of several tasks, and what several tasks exclude."""
    known = cfg["data"].get("tasks", {})
    for name, task in cfg["tasks"].items():
        if name not in known:
            there = did_you_mean(str(name), known) or "; data=multi_task has several (experiment=multi_task)"
            raise ConfigError(f"tasks.{name}: there is no such task in data.tasks{there}")
        if task.get("weight", 1) < 0:
            raise ConfigError(f"tasks.{name}.weight={task['weight']:g} must be at least 0")
    if not known:
        return
    teachers = [cfg["teacher"], *(task.get("teacher", {}) for task in cfg["tasks"].values())]
    excluded = {
        "teacher.checkpoint": cfg["teacher"]["checkpoint"] is not None, "assistants": bool(cfg["assistants"]),
        "teacher.ema": cfg["teacher"]["ema"] is not None, "teacher.features": bool(cfg["teacher"]["features"]),
        "peers": bool(cfg["peers"]),
        "teacher.sharded": any(teacher.get("sharded") for teacher in teachers),
    }  # fmt: skip
    if wrong := [key for key, given in excluded.items() if given]:
        raise ConfigError(
            f"data.tasks: each task has a teacher of its own, who answers with logits; leave out {', '.join(wrong)} "
            "(finished teachers are given as tasks.NAME.teacher.checkpoint)"
        )


def _check_schemes(cfg: dict[str, Any]) -> None:
    """Check the keys of assistants, peers and the mean teacher, and what they exclude."""
    for key in ("assistants", "peers"):
        for number, node in enumerate(cfg[key]):
            if "_target_" not in node:
                raise ConfigError(
                    f"{key}[{number}] has no _target_: give a network, as `student` is one, or '${{student}}'"
                )
    teacher = cfg["teacher"]
    if cfg["assistants"] and teacher["cache"] not in CACHE_MODES:
        raise ConfigError(
            "assistants: a path in teacher.cache keeps one teacher's answers only; use teacher.cache=auto"
        )
    if teacher["ema"] is None:
        return
    if not 0 <= teacher["ema"] < 1:
        raise ConfigError(f"teacher.ema={teacher['ema']:g} must be at least 0 and below 1")
    excluded = {
        "stages": "teacher" in cfg["stages"], "teacher.checkpoint": teacher["checkpoint"] is not None,
        "assistants": bool(cfg["assistants"]), "teacher.features": bool(teacher["features"]),
        "teacher.cache": teacher["cache"] not in ("auto", "off"), "teacher.compile": teacher["compile"],
        "teacher.calibrate": teacher["calibrate"],
        "teacher.device": teacher["device"] is not None, "teacher.sharded": teacher["sharded"],
    }  # fmt: skip
    wrong = [key for key, given in excluded.items() if given]
    if wrong:
        raise ConfigError(
            f"teacher.ema={teacher['ema']:g} makes the teacher from the student's own weights, anew in every step: "
            f"leave out what asks for another one ({', '.join(wrong)})"
        )
    if teacher["precision"] != "float32":
        raise ConfigError("teacher.ema averages in float32 and answers in it: set teacher.precision=float32")


def _check_sharded(cfg: dict[str, Any]) -> None:
    """Check that a teacher whose weights are shared can answer so: to all processes together, in every step."""
    teacher, trainer = cfg["teacher"], cfg["trainer"]
    if not teacher["sharded"]:
        return
    if not (shards(trainer) and processes(trainer) > 1):
        raise ConfigError(
            "teacher.sharded=true shares the teacher's weights out to the processes that share the student's: use it "
            "with trainer=fsdp or trainer=fsdp2, on several trainer.devices"
        )
    if teacher["cache"] != "off":
        raise ConfigError(
            f"teacher.sharded=true with teacher.cache={teacher['cache']}: what is kept the first process asks for "
            "alone, of a whole teacher; set teacher.cache=off, or teacher.sharded=false"
        )
    if teacher["calibrate"]:
        raise ConfigError(
            "teacher.sharded=true: a temperature is fitted to a whole teacher's answers; set teacher.calibrate=false"
        )
    if isinstance(teacher["checkpoint"], list) or number_of_teachers(teacher) > 1:
        raise ConfigError("teacher.sharded=true: an ensemble's members are not shared out; set it to false")
    if teacher["device"] is not None:
        raise ConfigError(
            f"teacher.sharded=true: a part of the teacher is on every process's device, and teacher.device="
            f"{teacher['device']} would be all of it on its own; give one of the two"
        )


def _check_schedules(cfg: dict[str, Any]) -> None:
    """Check temperature and alpha, and where they are schedules, their values all along the training."""
    for key, low, high in (("temperature", 0.0, math.inf), ("alpha", 0.0, 1.0)):
        given = cfg[key]
        if isinstance(given, bool | str) or not isinstance(given, int | float | dict):
            raise ConfigError(
                f"{key}={given!r} is neither a number nor a schedule (see kd_lightning/training/schedules.py)"
            )
        schedule = build(given) if isinstance(given, dict) else lambda _, value=given: value
        for value in (schedule(step / 100) for step in range(101)):
            if not low <= value <= high or not math.isfinite(value) or (key == "temperature" and value == 0):
                wanted = "above 0" if key == "temperature" else "between 0 (labels only) and 1 (teacher only)"
                raise ConfigError(f"{key}={value:g} must be {wanted}")


def _losses(cfg: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the losses of all tasks, each with its path."""
    own = {name: task["distillation"] for name, task in cfg["tasks"].items() if "distillation" in task}
    return [("distillation", cfg["distillation"]), *((f"tasks.{name}.distillation", own[name]) for name in own)]


def _check_terms(cfg: dict[str, Any]) -> None:
    """Check that no loss has a term without a class, or without a weight."""
    for path, node in _losses(cfg):
        for part in ("terms", "weights"):
            for name, value in (node.get(part) or {}).items():
                if value is None:
                    raise ConfigError(f"{path}.{part}.{name} needs a value; ~{path}.{part}.{name} leaves it out")


def _check_loss(cfg: dict[str, Any]) -> None:
    """Check the losses, by making them, and that some term counts."""
    if "distill" not in cfg["stages"]:
        return
    losses = {"distillation": cfg["distillation"]}
    losses |= {
        f"tasks.{n}.distillation": task["distillation"] for n, task in cfg["tasks"].items() if "distillation" in task
    }
    for path, node in losses.items():
        try:
            objective = build(node, balance=cfg["balance"])
        except KDError as error:
            line = str(error).replace("objective.", f"{path}.")  # a constructor does not know where it stands
            raise ConfigError(line if line.startswith(path) else f"{path}: {line}") from error
        if not isinstance(objective, Objective):
            raise ConfigError(f"{path}: {node['_target_']} is no objective: choose one, {path}=soft_target")
        if not any(objective.weights.values()):
            raise ConfigError(f"{path}.weights are all 0: nothing would be learned")


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
    if not isinstance(node["_target_"], str):
        raise ConfigError(f"{path}._target_={node['_target_']!r} is no import path, such as torch.optim.AdamW")
    takes = parameters(lookup(node["_target_"]))
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_"):
            continue
        if key not in takes:
            raise ConfigError(f"{path}.{key}: {node['_target_']} takes no '{key}'{did_you_mean(key, takes)}")
        if not any(True for _ in _targets(value)):  # nested objects are checked as nodes of their own
            _check_type(f"{path}.{key}", value, takes[key][0])
    if not path.startswith(_FILLED_IN) and ".teacher.network" not in path and not node.get("_partial_"):
        for key, (_, required) in takes.items():
            if required and key not in node:
                raise ConfigError(f"{path}.{key} needs a value: {node['_target_']} cannot do without it")


_FILLED_IN = ("student", "teacher.network", "assistants", "peers", "logger")
"""Nodes that the pipeline gives further arguments (number of classes, vocabulary, teacher; the folder to log in)."""


def _check_type(key: str, value: Any, expected: Any) -> None:
    from jsonargparse import ArgumentError, ArgumentParser

    if expected in (Any, dict, inspect.Parameter.empty) or key == "teacher.checkpoint":
        return
    if value is None and _needs_value(expected):
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


def _needs_value(expected: Any) -> bool:
    """Return whether a type has no None among its values."""
    if get_origin(expected) in (Union, UnionType):
        return all(map(_needs_value, get_args(expected)))
    plain = isinstance(expected, type) and expected not in (object, NoneType)
    return plain or get_origin(expected) in (Literal, list, tuple, Sequence)


_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", tuple: "a list",
    Sequence: "a list", Mapping: "a group of keys", dict: "a group of keys", NoneType: "null",
}  # fmt: skip


def _type_name(expected: Any) -> str:
    """Return what a type takes, in words of the command line."""
    origin = get_origin(expected)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(expected)))
    if origin in (Union, UnionType):  # what no command line can give (a tensor, an object) is left out
        named = [_type_name(one) for one in get_args(expected) if one in _WORDS or get_origin(one)]
        return " or ".join(dict.fromkeys(named)) or "what it takes"
    if origin in (list, tuple, Sequence) and get_args(expected):
        inside = [one for one in get_args(expected) if one is not ...]
        names = " and ".join(_type_name(one) for one in inside)
        return f"a list of {names}" if origin is not tuple or len(inside) == 1 else f"a list of {len(inside)} ({names})"
    return _WORDS.get(origin or expected) or "a " + str(getattr(expected, "__name__", expected)).replace("typing.", "")


def check_folder(folder: Path, cfg: dict[str, Any]) -> None:
    """Refuse a folder whose finished students were trained with other settings: its report would mix the two.

    Raises:
        ConfigError: Names the first keys that differ.
        KDError: Names the first file of a finished stage that is damaged or missing.
    """
    for place in sorted({*folder.glob("*/stage.json"), *folder.glob("*/*/stage.json")}):
        check_stage(place.parent)
    if not (folder / "config.yaml").is_file():
        return
    old, new = read_config(folder), dict(cfg)
    if not set(old["stages"]) - {"teacher"}:
        return
    for key in ("stages", "resume", "run_dir", "shared_dir", "logger", "checkpoint_every_n_steps"):
        old[key] = new[key] = None
    elsewhere = dict.fromkeys(("cache", "features", "answer_batch_size", "device", "compile", "sharded"))
    old["teacher"] |= elsewhere  # where answers come from, not what they are
    new["teacher"] = {**new["teacher"], **elsewhere}
    old["seeds"] = max(old["seeds"], new["seeds"])  # more seeds are welcome
    if changed := sorted(differences(old, new)):
        raise ConfigError(
            f"{folder} holds a finished run with other settings ({'; '.join(changed[:3])}): choose another name=... or "
            "remove it"
        )
