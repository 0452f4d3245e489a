"""Lightning callbacks of the pipeline, and for trainers of your own.

>>> import lightning as L
>>> import kd_lightning as kd
>>> trainer = L.Trainer(
...     accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[kd.callbacks.MeanTeacher()]
... )
"""

from kd_lightning.training.callbacks.compilation import Compilation
from kd_lightning.training.callbacks.divergence import Divergence
from kd_lightning.training.callbacks.filling import CacheFilling, TeacherTime
from kd_lightning.training.callbacks.mean_teacher import MeanTeacher
from kd_lightning.training.callbacks.predictions import PredictionWriter
from kd_lightning.training.callbacks.preemption import Preemption
from kd_lightning.training.callbacks.progress import StageProgress
from kd_lightning.training.callbacks.resume import ResumeCheckpoint
from kd_lightning.training.callbacks.stage_folder import StageFolder

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
    "TeacherTime",
]
