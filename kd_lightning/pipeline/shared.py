"""Stages that other runs with the same `shared_dir` have finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd_lightning.config.instantiate import in_sweep
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.prepare import kept_folder, settings_of, shared_place
from kd_lightning.pipeline.teacher_check import is_checked
from kd_lightning.runtime.processes import first, rank
from kd_lightning.training.run_folder import is_finished

if TYPE_CHECKING:
    from kd_lightning.pipeline.stages import Stage


def link_shared(run: Run, stages: Sequence[Stage]) -> None:
    """Link finished stages of `shared_dir` to the run's folder, before its time is estimated.

    These are teachers that will not be trained on any more, and baselines where all teachers are there, from which they
    may start. What is distilled may depend on texts that are still to be generated. A sweep has no estimate.
    """
    if run.cfg.shared_dir is None or in_sweep():
        return
    with first():
        if rank() == 0:
            _link(Run(run.cfg, run.console, run.data), stages)


def _link(run: Run, stages: Sequence[Stage]) -> None:
    """Do so, on behalf of a run that has not read its teachers yet."""
    learned = True
    for stage in stages:
        if stage.start is not None or not (stage.kind == "teacher" or (stage.kind == "baseline" and learned)):
            continue
        if not is_finished(run.folder / stage.path):
            settings = settings_of(run, stage)
            place = shared_place(run, stage, settings)
            if place is not None and is_finished(place) and (stage.kind == "baseline" or is_checked(place)):
                kept_folder(run, stage, settings)
        if stage.kind == "teacher":
            learned = learned and is_finished(run.folder / stage.path) and is_checked(run.folder / stage.path)
