"""A run's stages, looked at without training them."""

from __future__ import annotations

from torch import nn

from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.prepare import new_networks
from kd_lightning.pipeline.stages import plan


def student_of(run: Run, stage: str = "distill") -> nn.Module:
    """Return the new student of the first seed as a stage begins with it: `distill`, `baseline`, ..."""
    [found] = [one for one in plan(run) if one.path == f"seed_{run.seeds[0]}/{stage}"]
    return new_networks(run, found)[0]
