"""Where the teacher's answers come from: a policy object that is called with a batch, never trained."""

from kd_lightning.teachers.ahead import AheadTeacher
from kd_lightning.teachers.cached import CachedTeacher
from kd_lightning.teachers.ensemble import EnsembleNetwork, EnsembleTeacher
from kd_lightning.teachers.frozen import FrozenTeacher, Precision, Teacher

__all__ = [
    "AheadTeacher", "CachedTeacher", "EnsembleNetwork", "EnsembleTeacher", "FrozenTeacher", "Precision", "Teacher",
]  # fmt: skip
