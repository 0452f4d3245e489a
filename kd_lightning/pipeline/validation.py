"""Validation before any work: impossible combinations of keys, objects that cannot be built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from kd_lightning.config.instantiate import build, first_line, processes
from kd_lightning.config.nodes import check_node, nodes
from kd_lightning.config.schema import CACHE_MODES, Node, RunConfig, TeacherConfig
from kd_lightning.config.trust import trust_own
from kd_lightning.models.served import Server
from kd_lightning.pipeline.trainer_checks import check_trainers, named, shards, try_trainers
from kd_lightning.runtime.errors import ConfigError, KDError, did_you_mean
from kd_lightning.runtime.files import check_place
from kd_lightning.runtime.fingerprints import differences
from kd_lightning.runtime.onnx_files import is_onnx
from kd_lightning.teachers.ensemble import shares_of
from kd_lightning.training.objective import Objective
from kd_lightning.training.run_folder import check_stage, is_finished, read_config


def validate(settings: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Read a composed configuration; refuse, before any work, what cannot be.

    Raises:
        ConfigError: Names the key, what was given, what was expected and the nearest valid name.
    """
    cfg = RunConfig.parse(settings)
    trust_own(cfg.as_dict())
    _check(cfg)
    for name, task in cfg.tasks.items():
        if task.teacher:  # else it has the one that is checked
            with named(f"tasks.{name}"):
                _check(cfg.of_task(name))
    return cfg


def _check(cfg: RunConfig) -> None:
    """Check combinations of keys and build their objects, cheap and informative checks first."""
    _check_terms(cfg)
    _check_schedules(cfg)
    _check_teacher(cfg.teacher)
    _check_schemes(cfg)
    _check_on_policy(cfg)
    _check_generated(cfg)
    _check_tasks(cfg)
    _check_sharded(cfg)
    for path, node in nodes(cfg.as_dict()):
        given = _without_auto(node) if path == "trainer" else node
        check_node(path, given, whole=not path.startswith(_FILLED_IN) and ".teacher.network" not in path)
    check_node("teacher.trainer", {"_target_": cfg.trainer["_target_"], **_without_auto(cfg.teacher.trainer)})
    check_trainers(cfg)
    _check_losses(cfg)
    _check_places(cfg)
    try_trainers(cfg)


_FILLED_IN = ("student", "teacher.network", "assistants", "peers", "logger")
"""Nodes that the pipeline gives further arguments (number of classes, vocabulary, teacher; the folder to log in)."""


def _without_auto(trainer: Node) -> Node:
    """Return a trainer's arguments without the number of epochs that the budget decides."""
    return {key: value for key, value in trainer.items() if (key, value) != ("max_epochs", "auto")}


def _given(excluded: dict[str, bool]) -> str:
    """Return the names of the keys that are given."""
    return ", ".join(key for key, given in excluded.items() if given)


def _check_teacher(teacher: TeacherConfig) -> None:
    """Check the teacher's keys against each other."""
    _check_device(teacher.device)
    _check_served(teacher)
    _check_onnx(teacher)
    if teacher.folds > 1 and (wrong := _given({
        "teacher.checkpoint": teacher.checkpoint is not None, "teacher.seeds": teacher.seeds > 1,
        "teacher.ema": teacher.ema is not None, "teacher.weights": teacher.weights is not None,
        "teacher.features": bool(teacher.features),
    })):  # fmt: skip
        raise ConfigError(
            f"teacher.folds={teacher.folds} trains that many teachers, each without a fold, whose logits alone are "
            f"read: leave out {wrong}"
        )
    if teacher.cache_top_k is not None and teacher.cache_samples is not None:
        raise ConfigError(
            "teacher.cache_top_k keeps the likeliest tokens and teacher.cache_samples drawn ones: give one"
        )
    if teacher.cache_samples is not None and teacher.number > 1:
        raise ConfigError("teacher.cache_samples: what several teachers draw cannot be averaged; use one teacher")
    if teacher.checkpoint is not None and teacher.seeds > 1:
        raise ConfigError(f"teacher.seeds={teacher.seeds} are to be trained, and teacher.checkpoint to be loaded")
    if teacher.weights is not None and teacher.number == 1:
        raise ConfigError(
            "teacher.weights are those of an ensemble's members: give teacher.checkpoint a list of them, or set "
            "teacher.seeds"
        )
    if teacher.number > 1 and teacher.weights != "learned":
        shares_of(teacher.weights, teacher.number, teacher.combine)


def _check_served(teacher: TeacherConfig) -> None:
    """Check the keys of a teacher that a server runs."""
    if teacher.url is None:
        if teacher.model is not None:
            raise ConfigError("teacher.model names a served model, and there is no teacher.url")
        return
    Server(url=teacher.url, model=str(teacher.model))
    if teacher.model is None:
        raise ConfigError("teacher.url needs teacher.model, the name of the model there (GET /v1/models)")
    if teacher.checkpoint != teacher.url:
        raise ConfigError("teacher.url and teacher.checkpoint are two teachers: give one")
    if teacher.cache_top_k is None:
        raise ConfigError("teacher.url needs teacher.cache_top_k: how many of its likeliest tokens are stored, as 20")
    if wrong := _given({
        "teacher.cache_samples": teacher.cache_samples is not None, "teacher.features": bool(teacher.features),
        "teacher.compile": teacher.compile, "teacher.sharded": teacher.sharded, "teacher.ema": teacher.ema is not None,
        "teacher.device": teacher.device is not None, "teacher.calibrate": teacher.calibrate is True,
        "teacher.folds": teacher.folds > 1,
    }):  # fmt: skip
        raise ConfigError(f"teacher.url: a server gives its likeliest tokens alone; leave out {wrong}")


def _check_onnx(teacher: TeacherConfig) -> None:
    """Refuse what cannot be done to an ONNX file, which onnxruntime runs as it is."""
    names = teacher.checkpoint if isinstance(teacher.checkpoint, list) else [teacher.checkpoint]
    file = next((name for name in names if name is not None and is_onnx(name)), None)
    if file is not None and (wrong := _given({
        f"teacher.precision={teacher.precision}": teacher.precision != "float32",
        "teacher.features": bool(teacher.features), "teacher.compile": teacher.compile,
        "teacher.sharded": teacher.sharded, "teacher.device": teacher.device is not None,
    })):  # fmt: skip
        raise ConfigError(f"teacher.checkpoint={file}: onnxruntime runs it as it is, on the CPU; leave out {wrong}")


def _check_device(name: str | None) -> None:
    """Check that a teacher can be put on a device, and can compute there."""
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


def _check_schemes(cfg: RunConfig) -> None:
    """Check assistants, peers and the mean teacher, and what they exclude."""
    for key, given in (("assistants", cfg.assistants), ("peers", cfg.peers)):
        for number, node in enumerate(given):
            if "_target_" not in node:
                raise ConfigError(
                    f"{key}[{number}] has no _target_: give a network, as `student` is one, or '${{student}}'"
                )
    teacher = cfg.teacher
    if cfg.assistants and teacher.cache not in CACHE_MODES:
        raise ConfigError(
            "assistants: a path in teacher.cache keeps one teacher's outputs only; use teacher.cache=auto"
        )
    if teacher.ema is None:
        return
    if wrong := _given({
        "stages": "teacher" in cfg.stages, "teacher.checkpoint": teacher.checkpoint is not None,
        "assistants": bool(cfg.assistants), "teacher.features": bool(teacher.features),
        "teacher.cache": teacher.cache not in ("auto", "off"), "teacher.compile": teacher.compile,
        "teacher.calibrate": teacher.calibrate is True,
        "teacher.device": teacher.device is not None, "teacher.sharded": teacher.sharded,
    }):  # fmt: skip
        raise ConfigError(
            f"teacher.ema={teacher.ema:g} makes the teacher from the student's own weights, anew in every step: "
            f"leave out what needs another one ({wrong})"
        )
    if teacher.precision != "float32":
        raise ConfigError("teacher.ema averages in float32 and computes in it: set teacher.precision=float32")


def _check_on_policy(cfg: RunConfig) -> None:
    """Check what a student's own texts exclude."""
    share = f"on_policy.share={cfg.on_policy.share:g}"
    if cfg.on_policy.share == 0:
        return
    if cfg.on_policy.share > 1:
        raise ConfigError(f"{share}: expected a part of the texts, from 0 to 1")
    if cfg.teacher.cache != "off":
        raise ConfigError(
            f"{share}: the student's texts are new in each step, and no outputs can be stored for them: set "
            "teacher.cache=off"
        )
    if wrong := _given({
        "peers": bool(cfg.peers), "assistants": bool(cfg.assistants), "data.tasks": bool(cfg.data.get("tasks")),
        f"trainer.strategy={cfg.trainer.get('strategy')}": shards(cfg.trainer),
    }):  # fmt: skip
        raise ConfigError(f"{share}: one whole student continues texts: leave out {wrong}")


def _check_generated(cfg: RunConfig) -> None:
    """Check what a teacher's generated texts exclude."""
    texts, teacher = f"generated.texts={cfg.generated.texts}", cfg.teacher
    if cfg.generated.texts == 0:
        return
    if cfg.generated.texts > 1 and cfg.generated.temperature == 0:
        raise ConfigError(f"{texts}: the likeliest tokens are one text a prompt; set generated.temperature above 0")
    if wrong := _given({
        "data.tasks": bool(cfg.data.get("tasks")), "teacher.url": teacher.url is not None,
        "teacher.ema": teacher.ema is not None, "teacher.sharded": teacher.sharded,
        "an ensemble": teacher.number > 1,
    }):  # fmt: skip
        raise ConfigError(f"{texts}: one teacher generates texts, on this machine: leave out {wrong}")


def _check_tasks(cfg: RunConfig) -> None:
    """Check the keys of several tasks, and what several tasks exclude."""
    known = cfg.data.get("tasks", {})
    if unknown := [name for name in cfg.tasks if name not in known]:
        there = did_you_mean(unknown[0], known) or "; data=multi_task has several (experiment=multi_task)"
        raise ConfigError(f"tasks.{unknown[0]}: there is no such task in data.tasks{there}")
    sharded = cfg.teacher.sharded or any(task.teacher.get("sharded") for task in cfg.tasks.values())
    if known and (wrong := _given({
        "teacher.checkpoint": cfg.teacher.checkpoint is not None, "assistants": bool(cfg.assistants),
        "teacher.ema": cfg.teacher.ema is not None, "teacher.features": bool(cfg.teacher.features),
        "peers": bool(cfg.peers), "teacher.sharded": sharded,
    })):  # fmt: skip
        raise ConfigError(
            f"data.tasks: each task has a teacher of its own, which outputs logits; leave out {wrong} (finished "
            "teachers are given as tasks.NAME.teacher.checkpoint)"
        )


def _check_sharded(cfg: RunConfig) -> None:
    """Check the settings of a sharded teacher, which all processes run in every step."""
    teacher = cfg.teacher
    if cfg.balance == "gradnorm" and shards(cfg.trainer):
        raise ConfigError("balance=gradnorm compares whole gradients, and trainer=fsdp shards them: use fixed")
    if not teacher.sharded:
        return
    if not (shards(cfg.trainer) and processes(cfg.trainer) > 1):
        raise ConfigError(
            "teacher.sharded=true shares the teacher's weights out to the processes that share the student's: use it "
            "with trainer=fsdp or trainer=fsdp2, on several trainer.devices"
        )
    if teacher.cache != "off":
        raise ConfigError(
            f"teacher.sharded=true with teacher.cache={teacher.cache}: what is stored the first process computes "
            "alone, with a whole teacher; set teacher.cache=off, or teacher.sharded=false"
        )
    if teacher.calibrate is True:
        raise ConfigError(
            "teacher.sharded=true: a temperature is fitted to a whole teacher's outputs; set teacher.calibrate=false"
        )
    if isinstance(teacher.checkpoint, list) or teacher.number > 1:
        raise ConfigError("teacher.sharded=true: an ensemble's members are not shared out; set it to false")
    if teacher.device is not None:
        raise ConfigError(
            f"teacher.sharded=true: a part of the teacher is on every process's device, and teacher.device="
            f"{teacher.device} would be all of it on its own; give one of the two"
        )


def _check_schedules(cfg: RunConfig) -> None:
    """Check temperature and alpha, where they are schedules all along the training."""
    for key, given, high in (("temperature", cfg.temperature, math.inf), ("alpha", cfg.alpha, 1.0)):
        schedule = build(given) if isinstance(given, dict) else lambda _, value=given: value
        for value in (schedule(step / 100) for step in range(101)):
            if not 0 <= value <= high or not math.isfinite(value) or (key == "temperature" and value == 0):
                wanted = "above 0" if key == "temperature" else "between 0 (labels only) and 1 (teacher only)"
                raise ConfigError(f"{key}={value:g} must be {wanted}")


def _check_terms(cfg: RunConfig) -> None:
    """Check that no loss has a term without a class, or without a weight."""
    for path, node in cfg.losses.items():
        for part in ("terms", "weights"):
            for name, value in (node.get(part) or {}).items():
                if value is None:
                    raise ConfigError(f"{path}.{part}.{name} needs a value; ~{path}.{part}.{name} leaves it out")


def _check_losses(cfg: RunConfig) -> None:
    """Check the losses, by making them where they are read, and that some term counts."""
    if "distill" not in cfg.stages:
        return
    for path, node in cfg.losses.items():
        try:
            objective = build(node, balance=cfg.balance)
        except KDError as error:
            line = str(error).replace("objective.", f"{path}.")  # a constructor does not know where it stands
            raise ConfigError(line if line.startswith(path) else f"{path}: {line}") from error
        if not isinstance(objective, Objective):
            raise ConfigError(f"{path}: {node['_target_']} is no objective: choose one, {path}=soft_target")
        if not any(objective.weights.values()):
            raise ConfigError(f"{path}.weights are all 0: nothing would be learned")


def _check_places(cfg: RunConfig) -> None:
    """Check that files can be written where they are to go."""
    cache = None if cfg.teacher.cache in CACHE_MODES else cfg.teacher.cache
    for key, place in (("run_dir", cfg.run_dir), ("shared_dir", cfg.shared_dir), ("teacher.cache", cache)):
        if place is not None:
            check_place(Path(place).expanduser(), f"{key}={place}")


def check_folder(folder: Path, cfg: RunConfig) -> None:
    """Refuse a folder whose finished students have other settings, which its report would mix.

    Raises:
        ConfigError: Names the first keys that differ.
        KDError: Names the first file of a finished stage that is damaged or missing.
    """
    for place in sorted({*folder.glob("*/stage.json"), *folder.glob("*/*/stage.json")}):
        check_stage(place.parent)
    if not (folder / "config.yaml").is_file():
        return
    try:
        old = RunConfig.parse(read_config(folder))
    except ConfigError as error:
        raise ConfigError(
            f"{folder} holds a run of another version ({error}): choose another name=... or remove it"
        ) from error
    students = [folder / f"seed_{seed}" / stage for seed in old.seed_list for stage in old.stages if stage != "teacher"]
    if not students or not all(map(is_finished, students)):
        return  # none, or killed: a stage that has begun refuses other settings of its own
    more = {"seeds": max(old.seeds, cfg.seeds)}  # more seeds are welcome
    if changed := sorted(differences(old.deciding() | more, cfg.deciding())):
        kept = f" (teacher.checkpoint={folder} there keeps its teacher)" if is_finished(folder / "teacher") else ""
        raise ConfigError(
            f"{folder} holds a finished run with other settings ({'; '.join(changed[:3])}): choose another name=..."
            f"{kept}, or remove it"
        )
