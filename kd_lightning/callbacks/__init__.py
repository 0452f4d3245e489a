"""Lightning callbacks of the pipeline."""

from kd_lightning.callbacks.compilation import Compilation
from kd_lightning.callbacks.divergence import Divergence
from kd_lightning.callbacks.filling import CacheFilling
from kd_lightning.callbacks.mean_teacher import MeanTeacher
from kd_lightning.callbacks.predictions import PredictionWriter
from kd_lightning.callbacks.preemption import Preemption
from kd_lightning.callbacks.progress import StageProgress
from kd_lightning.callbacks.resume import ResumeCheckpoint
from kd_lightning.callbacks.stage_folder import StageFolder

__all__ = [
    "CacheFilling",
    "Compilation",
    "Divergence",
    "MeanTeacher",
    "PredictionWriter",
    "Preemption",
    "ResumeCheckpoint",
    "StageFolder",
    "StageProgress",
]
