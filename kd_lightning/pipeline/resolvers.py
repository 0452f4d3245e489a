"""The `${name:...}` functions of conf/, among them those that look into finished runs."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.budget import mask_sets
from kd_lightning.config.help import keys_help
from kd_lightning.config.resolvers import ddp_strategy, fast_inference, fast_precision, folder_name, one_minus
from kd_lightning.config.suited import LAYERS, network_for, of_reviews, suited_precision, suited_rate
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.onnx_files import is_onnx, near
from kd_lightning.training.run_folder import find_stage


def register_resolvers() -> None:
    """Make the `${name:...}` functions of conf/ known to OmegaConf."""
    OmegaConf.register_new_resolver("one_minus", one_minus, replace=True)
    OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)
    OmegaConf.register_new_resolver("fast_inference", inference_precision, replace=True)
    OmegaConf.register_new_resolver("fused_for", lambda precision: not str(precision).startswith("16"), replace=True)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("keys_help", lambda _root_: keys_help(_root_), replace=True)
    OmegaConf.register_new_resolver("network_for", network_for, replace=True)
    OmegaConf.register_new_resolver("layers_for", LAYERS.__getitem__, replace=True)
    OmegaConf.register_new_resolver("suited_rate", suited_rate, replace=True)
    OmegaConf.register_new_resolver("suited_precision", suited_precision, replace=True)
    OmegaConf.register_new_resolver("of_reviews", of_reviews, replace=True)
    OmegaConf.register_new_resolver("tokenizer_of", tokenizer_of, replace=True)
    OmegaConf.register_new_resolver("mask_sets", mask_sets, replace=True)
    OmegaConf.register_new_resolver("ddp_strategy", ddp_strategy, replace=True)
    OmegaConf.register_new_resolver("product", lambda *numbers: math.prod(map(int, numbers)), replace=True)
    OmegaConf.register_new_resolver("gpus_for", lambda kind, devices: None if kind == "cpu" else devices, replace=True)


def inference_precision(*, _root_: DictConfig) -> str:
    """Return the fastest precision of the teacher without a loss of accuracy; an ONNX file's is its own."""
    checkpoint: Any = OmegaConf.select(_root_, "teacher.checkpoint")
    names = checkpoint if OmegaConf.is_list(checkpoint) else [checkpoint]
    return "float32" if any(name is not None and is_onnx(str(name)) for name in names) else fast_inference()


def tokenizer_of(role: str, *, _root_: DictConfig) -> str | None:
    """Return the tokenizer that belongs to the student or the teacher.

    It is the one saved beside a finished teacher (`teacher.checkpoint`), or the one that a pretrained network's `name`
    brings. A network without one reads the other's tokens, and `minilm` where neither has its own.
    """
    checkpoint: Any = OmegaConf.select(_root_, "teacher.checkpoint")
    teacher: str | None
    if OmegaConf.is_list(checkpoint):  # an ensemble: see `TextData.reading` for members with another tokenizer
        checkpoint = checkpoint[0] if checkpoint else None
    if OmegaConf.select(_root_, "teacher.url") is not None:  # its model's name need not be that of a tokenizer
        ours = OmegaConf.is_interpolation(_root_.data, "tokenizer")
        teacher = OmegaConf.select(_root_, "teacher.model") if ours else None
    elif checkpoint is not None:
        teacher = tokenizer_beside(checkpoint)
    else:
        teacher = OmegaConf.select(_root_, "teacher.network.name")
    if role == "teacher":
        return teacher
    own = OmegaConf.select(_root_, "student.name") or _tokenizer_of_run(OmegaConf.select(_root_, "student.checkpoint"))
    return own or teacher or "minilm"


def _tokenizer_of_run(folder: str | None) -> str | None:
    """Return where a finished run's student has its tokenizer, if it has one."""
    if folder is None or not Path(folder).is_dir():
        return None

    with suppress(KDError):  # reported when the student is built
        place = find_stage(Path(folder)) / "tokenizer"
        return str(place) if place.is_dir() else None
    return None


def tokenizer_beside(checkpoint: str) -> str:
    """Return where a finished teacher's tokenizer is: a folder or a published name."""
    if Path(checkpoint).suffix == ".onnx":
        folders = near(Path(checkpoint).expanduser())
        return str(next((place for place in folders if (place / "tokenizer.json").is_file()), folders[0]))
    saved = [Path(checkpoint, stage, "tokenizer") for stage in ("teacher", "")]
    return next((str(folder) for folder in saved if folder.is_dir()), str(checkpoint))
