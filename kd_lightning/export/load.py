"""Loads exports as networks, for `kd-predict`, `kd-eval` and the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.config.trust import trusting
from kd_lightning.export.exported import is_export, read_exported
from kd_lightning.export.formats import format_named, require_packages
from kd_lightning.runtime.errors import ConfigError, KDError

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.training.run_folder import TrainedModel


def load_export(folder: Path, threads: int | None = None, trust: bool = False) -> TrainedModel:
    """Load an export folder.

    Args:
        folder: What `kd-export` wrote.
        threads: CPU threads for onnxruntime; None: as many as torch uses.
        trust: Whether it may run code that it brings or names: see docs/security.md.

    Raises:
        KDError: It is damaged, a package that it needs is missing, or it needs `trust`.
    """
    from kd_lightning.export.graph import reason

    exported = read_exported(folder)
    require_packages(exported.format, format_named(exported.format).READS)
    try:
        with trusting(trust):
            return _load(folder, exported, threads)
    except KDError:
        raise
    except Exception as error:  # each runtime raises its own types
        raise KDError(f"{folder} is damaged and cannot be read ({reason(error)}): export it again") from error


def _load(folder: Path, exported: Exported, threads: int | None) -> TrainedModel:
    from kd_lightning.data.image.store import ImageFormat
    from kd_lightning.tasks import task_of
    from kd_lightning.training.run_folder import TrainedModel

    network = format_named(exported.format).load(folder, exported, threads)
    tokenizer = None
    if exported.texts is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    images = None if exported.images is None else ImageFormat(**exported.images)
    return TrainedModel(
        network.eval(), tokenizer, exported.class_names, exported.max_length, exported.texts, folder,
        task_of(exported.predicts), images, exported.windows,
    )  # fmt: skip


def load_model(folder: Path, seed: int | None = None) -> TrainedModel:
    """Load a run folder, one of its stages, or an export folder.

    Raises:
        KDError: It cannot be read, or is an export, for which a seed is given.
    """
    from kd_lightning.training.run_folder import load_run

    if seed is not None and is_export(folder):
        raise ConfigError(f"--seed {seed}: {folder} is an export, which holds one student: omit --seed")
    return load_export(folder) if is_export(folder) else load_run(folder, seed)
