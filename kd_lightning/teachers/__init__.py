"""Teachers: objects that return a teacher's outputs for a batch and are never trained.

>>> from torch import nn
>>> import kd_lightning as kd
>>> teacher = kd.teachers.EMATeacher(student=nn.Linear(4, 2), decay=0.99)
"""

from kd_lightning.teachers.ahead import AheadTeacher
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.calibrated import CalibratedTeacher, fit_temperature
from kd_lightning.teachers.cross_fitted import CrossFittedTeacher
from kd_lightning.teachers.ema import EMATeacher
from kd_lightning.teachers.ensemble import Combine, EnsembleNetwork, EnsembleTeacher, fit_weights
from kd_lightning.teachers.frozen import FrozenTeacher, Precision, Teacher
from kd_lightning.teachers.multi_task import MultiTaskTeacher, SideBySide
from kd_lightning.teachers.sampled import SampledTeacher

__all__ = [
    "AheadTeacher", "CachedTeacher", "CalibratedTeacher", "Combine", "CrossFittedTeacher", "EMATeacher",
    "EnsembleNetwork", "EnsembleTeacher", "FrozenTeacher", "MultiTaskTeacher", "Precision", "SampledTeacher",
    "SideBySide", "Teacher", "fit_temperature", "fit_weights",
]  # fmt: skip
