"""What is exported: a run's student, with the examples that it is held against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.errors import KDError
from kd_lightning.runs import find_stage, load_run, read_json

if TYPE_CHECKING:
    from kd_lightning.data import ClassificationData
    from kd_lightning.runs import TrainedModel
    from kd_lightning.types import Batch

CALIBRATION = 256
"""Training examples from which static quantisation learns the range of every activation."""


def find_student(run: Path, seed: int | None = None) -> Path:
    """Return the stage folder of a run's student; nothing is read but which files there are.

    Raises:
        KDError: There is no such folder, its student is not finished, or it holds a teacher alone.
    """
    if not run.is_dir():
        raise KDError(f"{run}: no such folder; give a run folder that kd-train wrote")
    finished = (run / "stage.json").is_file()
    if finished or (run / "settings.json").is_file():
        if not finished:
            raise KDError(f"{run} is unfinished: run the same kd-train again, and it goes on where it stopped")
        if read_json(run / "task.json").get("role") == "teacher":
            raise KDError(f"{run} is a teacher, and only students are exported: give the run folder, {run.parent}")
        return run
    try:
        return find_stage(run, seed)
    except KDError:
        stages = sorted(run.glob("seed_*" if seed is None else f"seed_{seed}"))
        begun = [path.parent for stage in stages for path in sorted(stage.glob("*/settings.json"))]
        if begun:
            raise KDError(
                f"{run} is unfinished ({begun[-1].relative_to(run)} has begun): run the same kd-train again, and it "
                "goes on where it stopped"
            ) from None
        if seed is None and (run / "teacher" / "stage.json").is_file():
            raise KDError(
                f"{run} holds a teacher and no student: train one with kd-train stages=[teacher,distill]"
            ) from None
        raise


@dataclass
class Source:
    """A student, and the examples that its export is calibrated on and held against.

    Attributes:
        stage: The stage folder it was read from.
        model: The student.
        data: The run's data, in the tokens that the student reads.
    """

    stage: Path
    model: TrainedModel
    data: ClassificationData

    @cached_property
    def held_out(self) -> list[Batch]:
        """The validation split. The test split is no place to choose a format by."""
        batches = list(self.data.val_dataloader())
        if not batches:
            raise KDError(f"the data of {self.stage} have no validation examples to hold an export against")
        return batches

    @cached_property
    def calibration(self) -> list[Batch]:
        """Training examples, as many as `CALIBRATION`."""
        found: list[Batch] = []
        for batch in self.data.select(tokens=role_of(self.stage), pool=False).train_dataloader():
            if sum(len(one["index"]) for one in found) >= CALIBRATION:
                break
            found.append(batch)
        return found


def open_source(stage: Path) -> Source:
    """Read a student and its run's data.

    Args:
        stage: A finished stage folder.

    Raises:
        KDError: The run's configuration is gone, or the data cannot be read.
    """
    return Source(stage, load_run(stage), run_data(stage).select(tokens=role_of(stage)))


def role_of(stage: Path) -> Any:
    """Return whose tokens a stage's network reads."""
    return read_json(stage / "task.json")["role"]


def run_data(stage: Path) -> ClassificationData:
    """Return the data of the run that a stage is of.

    Raises:
        KDError: The run's configuration is gone, or the data cannot be read.
    """
    from omegaconf import DictConfig, OmegaConf

    from kd_lightning.config import build

    root = next((folder for folder in (stage, *stage.parents) if (folder / "config.yaml").is_file()), None)
    if root is None:
        raise KDError(
            f"{stage}: no folder above it has the config.yaml of a finished run, which says what data an export is "
            "held against: run the same kd-train again to its end"
        )
    cfg = OmegaConf.load(root / "config.yaml")
    assert isinstance(cfg, DictConfig)
    data: ClassificationData = build(cfg["data"])
    data.prepare()
    return data
