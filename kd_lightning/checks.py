"""What is refused before any work: unknown keys, wrong types and values, combinations that cannot be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch
from omegaconf import DictConfig, OmegaConf

from kd_lightning.balance import make_balance
from kd_lightning.config import build, lookup, parameters, processes, to_dict
from kd_lightning.errors import ConfigError, did_you_mean
from kd_lightning.processes import launched
from kd_lightning.runs import check_stage, differences, read_config
from kd_lightning.teachers.ensemble import Combine, shares_of
from kd_lightning.teachers.frozen import Precision
from kd_lightning.trust import trust_own

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
    _check_keys(settings)
    _check_values(settings)
    _check_schedules(settings)
    for path, node in _targets(settings):
        _check_node(path, node)
    _check_trainers(settings)
    if "distill" in settings["stages"]:
        build(settings["distillation"], balance=settings["balance"])  # a loss's own checks


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
_OURS = (
    "callbacks", "logger", "default_root_dir", "num_sanity_val_steps", "use_distributed_sampler",
    "enable_model_summary", "enable_progress_bar", "val_check_interval", "check_val_every_n_epoch",
)  # fmt: skip
"""Trainer arguments that the pipeline sets, and would set over what is given."""


def _check_keys(cfg: dict[str, Any]) -> None:
    """Check names and types of the keys that belong to no class."""
    groups: dict[str, Any] = dict.fromkeys(_GROUPS, dict)
    fixed = [
        ("", cfg, _ROOT | groups), ("teacher.", cfg["teacher"], _TEACHER), ("finetune.", cfg["finetune"], _FINETUNE),
    ]  # fmt: skip
    tasks = ((f"tasks.{name}.", task, _TASK) for name, task in cfg["tasks"].items())
    teachers = ((f"tasks.{name}.teacher.", task.get("teacher", {}), _TEACHER) for name, task in cfg["tasks"].items())
    for prefix, node, known in chain(fixed, tasks, teachers):  # one after the other: each is checked before it is read
        for key, value in node.items():
            if key not in known:
                raise ConfigError(f"{prefix}{key}: there is no such key{did_you_mean(str(key), known)}")
            if value is None and NoneType not in get_args(known[key]):
                raise ConfigError(f"{prefix}{key} needs a value")
            _check_type(f"{prefix}{key}", value, known[key])


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
    if cfg["balance"] == "gradnorm" and _shards(cfg["trainer"]):
        raise ConfigError("balance=gradnorm compares whole gradients, and trainer=fsdp shards them: use fixed")
    if cfg["resume"] not in ("auto", "never"):
        raise ConfigError(f"resume={cfg['resume']!r} must be auto or never")
    if (device := cfg["teacher"]["device"]) is not None:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ConfigError(f"teacher.device={device!r} is no device, such as cuda:1") from error
    checkpoint, weights = cfg["teacher"]["checkpoint"], cfg["teacher"]["weights"]
    _check_folds(cfg["teacher"])
    members = number_of_teachers(cfg["teacher"])
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
    if mode not in CACHE_MODES and "/" not in mode:
        raise ConfigError(
            f"teacher.cache={mode!r} is neither a mode nor a path (which has a slash){did_you_mean(mode, CACHE_MODES)}"
        )
    _check_schemes(cfg)
    _check_tasks(cfg)
    _check_sharded(cfg)


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
    if not (_shards(trainer) and processes(trainer) > 1):
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
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(str, get_args(expected)))
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(expected) or "a " + str(getattr(expected, "__name__", expected)).replace("typing.", "")


def _check_trainers(cfg: dict[str, Any]) -> None:
    """Check the trainer's settings for the students, and as the teacher's own change them."""
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
        if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ConfigError(f"{path}.accelerator={trainer['accelerator']} needs a GPU, and torch finds none here")
        _check_processes(path, trainer)
        if cfg["compile"] and processes(trainer) > 1:
            raise ConfigError(f"compile=true: the {processes(trainer)} processes of {path} would not compile; use one")


def _check_processes(path: str, trainer: dict[str, Any]) -> None:
    """Check that the processes a trainer wants are those that were started, or that it starts without this command."""
    wanted, started = processes(trainer), launched()
    name = _strategy(trainer)
    if name.startswith("fsdp") or name.endswith("FSDPStrategy"):
        raise ConfigError(
            f"{path}.strategy={name} is torch's older sharding, which narrows losses' projectors to 16 bits and does "
            "not clip by norm: use trainer=fsdp (GPUs) or trainer=fsdp2"
        )
    spawns = name.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook"))
    if started > 1 and wanted != started:
        raise ConfigError(
            f"{started} processes were started for this command (srun or torchrun), and {path} wants {wanted}: set "
            f"trainer.devices and trainer.num_nodes to match, such as trainer=ddp trainer.devices={started}"
        )
    if started > 1 and spawns:
        raise ConfigError(
            f"{path}.strategy={name} starts processes itself, and {started} are there already (srun or torchrun): use "
            "strategy=ddp (trainer=ddp)"
        )
    if started == 1 and wanted > 1 and not spawns:
        raise ConfigError(
            f"{path}.strategy={name} with {wanted} processes would start the whole command (in a sweep, the whole "
            "sweep) again in each of them: use trainer=ddp (ddp_spawn) on one machine, or start one process a device "
            f"yourself: torchrun --nproc-per-node={wanted} -m kd_lightning.train ..., or srun under SLURM"
        )


def _strategy(trainer: dict[str, Any]) -> str:
    strategy = trainer.get("strategy", "auto")
    return str(strategy.get("_target_") if isinstance(strategy, dict) else strategy)


def _shards(trainer: dict[str, Any]) -> bool:
    """Return whether the weights are shared out to the processes."""
    return _strategy(trainer).endswith("ModelParallelStrategy")


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
