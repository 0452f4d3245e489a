"""Loss terms: one file a method, a pure function and the module that configures it. Needs torch and nothing else."""

from kd_lightning.losses.cross_entropy import CrossEntropyLoss, cross_entropy
from kd_lightning.losses.fused_linear import FusedLinearKDLoss, FusedLoss, chunked_soft_target, fused_linear_kd
from kd_lightning.losses.soft_target import SoftTargetLoss, soft_target
from kd_lightning.losses.term import Term

__all__ = [
    "CrossEntropyLoss",
    "FusedLinearKDLoss",
    "FusedLoss",
    "SoftTargetLoss",
    "Term",
    "chunked_soft_target",
    "cross_entropy",
    "fused_linear_kd",
    "soft_target",
]
