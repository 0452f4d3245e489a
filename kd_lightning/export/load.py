"""Exports read back, as networks like any other: for `kd-predict`, `kd-eval` and the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.export.exported import is_export, read_exported
from kd_lightning.export.formats import format_named, require_packages

if TYPE_CHECKING:
    from kd_lightning.runs import TrainedModel


def load_export(folder: Path, threads: int | None = None) -> TrainedModel:
    """Read an export folder.

    Args:
        folder: What `kd-export` wrote.
        threads: CPU threads for onnxruntime; None: as many as torch uses.

    Raises:
        KDError: It is damaged, or a package that it needs is missing.
    """
    from kd_lightning.data.image_store import ImageFormat
    from kd_lightning.runs import TrainedModel
    from kd_lightning.tasks import task_of

    exported = read_exported(folder)
    format = format_named(exported.format)
    require_packages(exported.format, format.READS)
    network = format.load(folder, exported, threads)
    tokenizer = None
    if exported.texts is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    images = None if exported.images is None else ImageFormat(**exported.images)
    return TrainedModel(
        network.eval(), tokenizer, exported.class_names, exported.max_length, exported.texts, folder,
        task_of(exported.predicts), images,
    )  # fmt: skip


def load_model(folder: Path, seed: int | None = None) -> TrainedModel:
    """Read a run folder, one of its stages, or an export folder."""
    from kd_lightning.runs import load_run

    return load_export(folder) if is_export(folder) else load_run(folder, seed)
