"""Loss terms: one file a method, a pure function and the module that configures it. Needs torch and nothing else."""

from kd_lightning.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target
from kd_lightning.losses.term import Term

__all__ = ["CrossEntropyLoss", "SoftTargetLoss", "Term", "cross_entropy", "soft_target"]
