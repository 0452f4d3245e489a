"""Loss terms: one file per method, with a pure function and the `Term` that configures it.

They need torch and nothing else.

Functions whose value is a mean over examples or positions take torch's `reduction`. Those that compare a batch's
relations or distributions as a whole (`rkd`, `pkt`, `similarity_preserving`, `correlation_congruence`, `dist`,
`similarity_kl`, `contrastive`, `margin_mse`), a query's documents (`list_labels`, `listwise_kl`, `ranknet`), or several
networks or exits at once (`deep_mutual`, `byot`), are one number and have none.

A method is imported from its file, `from kd_lightning.losses.dkd import DKDLoss, dkd`; the reference method's stand
here too.
"""

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.soft_target import SoftTargetLoss
from kd_lightning.losses.term import Term

__all__ = ["CrossEntropyLoss", "SoftTargetLoss", "Term"]
