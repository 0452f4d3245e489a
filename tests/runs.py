"""A run's stages, looked at without training its students."""

from __future__ import annotations

from rich.console import Console
from torch import nn

from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.prepare import new_networks, prepare
from kd_lightning.pipeline.stages import plan
from kd_lightning.training.fit import train


def student_of(run: Run, stage: str = "distill") -> nn.Module:
    """Return the new student of the first seed as a stage begins with it; the teacher is trained if it is not yet."""
    stages = plan(run)
    for one in stages:
        if one.kind == "teacher":
            train(prepare(run, one), Console(quiet=True))
    [found] = [one for one in stages if one.path == f"seed_{run.seeds[0]}/{stage}"]
    return new_networks(run, found)[0]
