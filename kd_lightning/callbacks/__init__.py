"""Lightning callbacks of the pipeline."""

from kd_lightning.callbacks.filling import CacheFilling
from kd_lightning.callbacks.mean_teacher import MeanTeacher
from kd_lightning.callbacks.progress import StageProgress
from kd_lightning.callbacks.resume import ResumeCheckpoint

__all__ = ["CacheFilling", "MeanTeacher", "ResumeCheckpoint", "StageProgress"]
