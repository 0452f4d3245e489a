"""Loss terms: one file a method, a pure function and the module that configures it. Needs torch and nothing else.

A method is imported from its file, `from kd_lightning.losses.dkd import DKDLoss, dkd`; the reference method's stand
here too.
"""

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.soft_target import SoftTargetLoss
from kd_lightning.losses.term import Term

__all__ = ["CrossEntropyLoss", "SoftTargetLoss", "Term"]
