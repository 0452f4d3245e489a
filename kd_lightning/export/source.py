"""The student to export, and the examples that its export is compared on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.data.corpus.blocks import unpacked
from kd_lightning.models.lora import merged
from kd_lightning.runtime.errors import ConfigError, DataError, KDError
from kd_lightning.training.run_folder import (
    NETWORK,
    check_stage,
    find_stage,
    is_finished,
    load_run,
    read_config,
    read_task,
    run_root,
)

if TYPE_CHECKING:
    from torch import nn

    from kd_lightning.data import IndexedData
    from kd_lightning.data.datamodule import Role
    from kd_lightning.training.run_folder import TrainedModel
    from kd_lightning.types import Batch

CALIBRATION = 256
"""Number of training examples for the activation ranges of static quantisation."""


def find_student(run: Path, seed: int | None = None) -> Path:
    """Return the stage folder of a run's student, without loading it.

    Raises:
        ConfigError: There is no such folder, or it holds no student.
        KDError: Its student is not finished.
    """
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give a run folder that kd-train wrote")
    if is_finished(run):
        if role_of(run) == "teacher":
            raise ConfigError(f"{run} is a teacher, and only students are exported: give the run folder, {run.parent}")
        return run
    if seed is None and is_finished(run / "teacher") and not any(run.glob("seed_*")):
        raise ConfigError(f"{run} holds a teacher and no student: train one with kd-train stages=[teacher,distill]")
    return find_stage(run, seed)


@dataclass
class Source:
    """A student, and the examples for calibrating and checking its export.

    Attributes:
        stage: Its stage folder.
        model: The student.
        data: The run's data, in the student's tokens.
    """

    stage: Path
    model: TrainedModel
    data: IndexedData

    @cached_property
    def network(self) -> nn.Module:
        """The student's network, with adapters merged into its weights."""
        return merged(self.model.network)

    @cached_property
    def held_out(self) -> list[Batch]:
        """The validation split, as it is read when deployed: choosing a format must not use the test split."""
        batches = [one for batch in self.data.val_dataloader() for one in unpacked(batch)]
        if not batches:
            raise DataError(f"the data of {self.stage} have no validation examples to check an export on")
        return batches

    @cached_property
    def calibration(self) -> list[Batch]:
        """`CALIBRATION` training examples."""
        found: list[Batch] = []
        for batch in self.data.select(tokens=role_of(self.stage), pool=False).train_dataloader():
            if sum(len(one["index"]) for one in found) >= CALIBRATION:
                break
            found += unpacked(batch)
        return found


def open_source(stage: Path) -> Source:
    """Load a student and its run's data.

    Args:
        stage: A finished stage folder.

    Raises:
        KDError: The run's configuration is gone, or the data cannot be read.
    """
    return Source(stage, load_run(stage), run_data(stage).select(tokens=role_of(stage)))


def role_of(stage: Path) -> Any:
    """Return whose tokens a stage's network uses."""
    return read_task(stage)["role"]


def run_data(stage: Path, remedy: str = "restore them, or train again") -> IndexedData:
    """Return the data that a stage was trained on: its own splits and classes, in its run's own tokens.

    Args:
        stage: A finished stage folder.
        remedy: What the user can do if the data have changed.

    Raises:
        KDError: The run's configuration is gone, or the data cannot be read, or have changed since the training.
    """
    from kd_lightning.config.trust import build_saved
    from kd_lightning.data.sources.places import found

    root = run_root(stage)
    if root is None:
        raise KDError(
            f"{stage}: no folder above it has the config.yaml of its run, which names its data: run the same kd-train "
            "again, which writes it again"
        )
    cfg = read_config(root)
    settings = _bare(found(cfg["data"], was=Path(cfg.get("run_dir", root)), now=root))
    data: IndexedData = build_saved(settings, root / "config.yaml")
    data.read_with(saved_tokenizers(stage, root))
    trained_on = read_task(stage)["data"]
    try:
        data.prepare()
    except DataError as error:
        raise DataError(f"{error} (has it changed since the training? {remedy})") from error
    if data.labelled != trained_on:
        raise DataError(f"the examples or labels in {_files(settings)} changed since the training: {remedy}")
    return data


def _bare(settings: Any) -> Any:
    """Return data settings without generated texts and without cache folders, which are the reader's.

    No score is of those texts, so the model that wrote them is not needed any more.
    """
    if not isinstance(settings, dict):
        return settings
    own = {"cache_dir": None, "generate": 0}
    return {key: own[key] if key in own else _bare(value) for key, value in settings.items()}


def saved_tokenizers(stage: Path, root: Path) -> dict[Role, str]:
    """Return the folders of the tokenizers that a run has saved, by role."""
    found: dict[Role, str] = {}
    for place in (root / "teacher", stage):
        if (place / "tokenizer").is_dir() and is_finished(place):
            check_stage(place, NETWORK)
            found[role_of(place)] = str(place / "tokenizer")
    return found


def _files(settings: dict[str, Any]) -> str:
    """Return the files or names of the data, for messages."""
    if "tasks" in settings:
        return ", ".join(dict.fromkeys(map(_files, settings["tasks"].values())))
    named = [value for key, value in settings.items() if key.endswith(("_file", "folder", "path")) or key == "name"]
    return ", ".join(str(value) for value in named if value) or str(settings["_target_"]).rpartition(".")[2]
