"""Checks that named networks exist, before anything else is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd_lightning.config.instantiate import first_line, lookup
from kd_lightning.config.schema import Node, RunConfig
from kd_lightning.models.bi_encoder_from_checkpoint import bi_encoder
from kd_lightning.models.hf import locate, pretrained
from kd_lightning.models.sentence_encoder import sentence_encoder
from kd_lightning.pipeline.from_run import from_run
from kd_lightning.runtime.assets import ENCODERS, PRETRAINED
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.onnx_files import is_onnx, onnx_file
from kd_lightning.training.run_folder import teacher_stage

NEGATIVES = "data.negatives_by"


def check_sources(cfg: RunConfig) -> None:
    """Refuse a teacher, student or pretrained network that exists neither here nor on the hub.

    Raises:
        ConfigError: Names the key, and folders with a similar name.
        KDError: The teacher's training has begun and is not finished.
    """
    for key, name in _sources(cfg):
        if key.endswith("teacher.checkpoint"):
            if is_onnx(name):
                onnx_file(name, key)
            elif teacher_stage(Path(name)) is None:
                _check_source(key, name)
        elif key == NEGATIVES:
            _check_source(key, name, ENCODERS)
        elif key.endswith(".name"):
            _check_source(key, name)
        elif not Path(name).is_dir():
            raise ConfigError(f"{key}={name}: there is no such run folder{_near(name)}")


def _sources(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the names of networks that this run loads, each with its key."""
    if cfg.data.get("hard_negatives"):
        yield NEGATIVES, str(cfg.data["negatives_by"])
    teachers = {"teacher": cfg.teacher.chosen(("checkpoint", "network"))}
    teachers |= {f"tasks.{name}.teacher": task.teacher for name, task in cfg.tasks.items()}
    networks: dict[str, Node] = {}
    for key, teacher in teachers.items():
        checkpoint = teacher.get("checkpoint")
        for one in checkpoint if isinstance(checkpoint, list) else [checkpoint]:
            if one is not None and "://" not in str(one):  # a server
                yield f"{key}.checkpoint", str(one)
        if checkpoint is None and "teacher" in cfg.stages:
            networks[f"{key}.network"] = teacher.get("network", {})
    if cfg.stages != ["teacher"]:
        networks["student"] = cfg.student
        for key, given in (("assistants", cfg.assistants), ("peers", cfg.peers)):
            networks |= {f"{key}[{number}]": node for number, node in enumerate(given)}
    for key, node in networks.items():
        kind = lookup(node["_target_"]) if "_target_" in node else None
        if kind in (pretrained, sentence_encoder, bi_encoder, from_run):
            name = "checkpoint" if kind is from_run else "name"
            yield f"{key}.{name}", str(node[name])


def _check_source(key: str, name: str, assets: Sequence[str] = PRETRAINED) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache

    if name in PRETRAINED:  # fetched where it is read
        return
    try:
        source, local = locate(name, key, assets)
        if not local and not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=10)
    except ConfigError as error:  # it looks like a path
        raise ConfigError(f"{error}{_near(name)}") from error
    except Exception as error:  # the hub and what it is reached with raise a dozen kinds; each means the same here
        raise ConfigError(
            f"{key}={name}: there is no such folder{_near(name)}, and no such name on the Hugging Face hub, or it "
            f"cannot be reached ({first_line(error)[:200]})"
        ) from error


def _near(name: str) -> str:
    """Return folders with a similar name, beside the one that was meant and among the runs."""
    path = Path(name).expanduser()
    there = {folder: folder.name for place in (path.parent, Path("runs")) for folder in _folders(place)}
    close = difflib.get_close_matches(path.name, there.values(), n=3, cutoff=0.6)
    found = sorted(str(folder) for folder, own in there.items() if own in close)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _folders(place: Path) -> list[Path]:
    try:
        return [folder for folder in place.iterdir() if folder.is_dir()]
    except OSError:
        return []
