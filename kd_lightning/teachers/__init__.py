"""Where the teacher's answers come from: a policy object that is called with a batch, never trained."""

from kd_lightning.teachers.cached import CachedTeacher, teacher_logits
from kd_lightning.teachers.frozen import FrozenTeacher, Teacher

__all__ = ["CachedTeacher", "FrozenTeacher", "Teacher", "teacher_logits"]
