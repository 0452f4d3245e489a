"""Lightning callbacks of the pipeline."""

from kd_lightning.callbacks.progress import StageProgress
from kd_lightning.callbacks.resume import ResumeCheckpoint

__all__ = ["ResumeCheckpoint", "StageProgress"]
