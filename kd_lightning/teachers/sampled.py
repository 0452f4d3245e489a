r"""A teacher of a few drawn tokens: its distribution, estimated without bias from K of V classes.

Top-K with its tail merges the tail's classes; a loss over K + 1 classes is not that over V. Drawn classes with weights
keep forward KL and its gradient right on average (Anshumann et al. 2025, arXiv 2503.16870). With :math:`\pi_i` the
chance that class i is among the K, the weight of one that is drawn is :math:`w_i = p_i / \pi_i`, and

.. math:: \mathbb{E}\Big[\sum_{i \in S} w_i f(i)\Big] = \sum_i p_i f(i).

The paper draws with replacement, so that likely tokens are drawn again and again. Here all K classes differ:
:math:`\pi_i = \min(1, p_i / \tau)` with the threshold :math:`\tau` at which they sum to K, so that likely classes are
certain and keep their probability, all others weigh :math:`\tau`, and the weights of a row sum to 1. Systematic
sampling (Madow 1949) draws exactly so: points at distance 1, from a random start, on the classes' cumulated chances.

The start of a token's row follows from the tokens up to it: the same text has the same classes whenever it is drawn,
in whatever batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kd_lightning.models.adapt import PLACES
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.mixing import mixed
from kd_lightning.teachers.frozen import Teacher, WrappedTeacher
from kd_lightning.types import Batch, ModelOutput, SparseLogits

VERSION = 1
"""Raised when the same logits and tokens have other classes drawn."""

AT_ONCE = 2**22
"""How many logits are gone through together."""

LEAST = -1e4
"""The smallest log probability that is kept; its weight is 0."""


class SampledTeacher(WrappedTeacher):
    """Draws classes of each token from another teacher's logits; see the top of this file.

    Args:
        inner: The other teacher, of logits per token `(B, L, V)`, or per masked one.
        count: K, below V.

    Raises:
        ConfigError: At the first batch: logits that are not per token, or of K classes or fewer.
    """

    def __init__(self, inner: Teacher, count: int) -> None:
        super().__init__(inner)
        self.count = count

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the other teacher's output with logits `(B, L, 0)` and the drawn ones in `sparse`."""
        output, own = self.inner(batch), "teacher_" if "teacher_input_ids" in batch else ""
        if output.logits.ndim != 3 or output.logits.shape[-1] <= self.count:
            raise ConfigError(
                f"teacher.cache_samples={self.count} draws of each token's classes, and the teacher's logits are "
                f"{tuple(output.logits.shape)}: it is for language models, and below their number of tokens"
            )
        starts = starts_of(batch[f"{own}input_ids"], batch.get(f"{own}attention_mask"))
        if PLACES in batch:
            starts = starts.gather(1, batch[PLACES])
        return ModelOutput(output.logits[..., :0], output.features, drawn(output.logits, self.count, starts))


def starts_of(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a number in [0, 1) for each token, `(B, L)` float64, that only the tokens up to it decide.

    Args:
        ids: `(B, L)` int64.
        mask: `(B, L)`, nonzero at real tokens; None: all of them are.
    """
    real = np.ones(ids.shape, bool) if mask is None else mask.cpu().numpy().astype(bool)
    place = real.cumsum(1).astype(np.uint64)
    with np.errstate(over="ignore"):
        each = mixed(ids.cpu().numpy().astype(np.uint64) + (place << np.uint64(32)), 0) * real
        found = mixed(each.cumsum(1, dtype=np.uint64), 1) >> np.uint64(40)
    return torch.from_numpy(found.astype(np.float64) / 2**24).to(ids.device)


def drawn(logits: Tensor, count: int, starts: Tensor) -> SparseLogits:
    """Draw `count` classes of each row.

    Args:
        logits: `(..., V)`.
        count: K, below V.
        starts: `(...)`, each in [0, 1).
    """
    rows, first = logits.detach().reshape(-1, logits.shape[-1]), starts.reshape(-1)
    size = max(AT_ONCE // logits.shape[-1], 1)
    parts = [_drawn(rows[at : at + size], count, first[at : at + size]) for at in range(0, max(len(rows), 1), size)]
    shape = starts.shape
    values, ids, rest = (torch.cat(part).reshape(*shape, *part[0].shape[1:]) for part in zip(*parts, strict=True))
    return SparseLogits(values, ids, rest, logits.shape[-1], drawn=True)


def _drawn(logits: Tensor, count: int, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log probabilities and classes `(N, K)`, and the logarithm of the threshold `(N,)`."""
    log_p = logits.float().log_softmax(-1)
    likeliest = log_p.topk(count).indices
    p = log_p.exp()
    top = p.gather(-1, likeliest).double()
    others = p.scatter_(-1, likeliest, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    slots = torch.arange(count, device=logits.device)
    thresholds = (top.flip(-1).cumsum(-1).flip(-1) + others) / (count - slots)  # if those before are certain
    certain = (top <= thresholds).int().argmax(-1, keepdim=True)  # how many are
    threshold = thresholds.gather(-1, certain).clamp(min=torch.finfo(torch.float64).tiny)
    p.scatter_(-1, likeliest, torch.where(slots < certain, 0.0, top).float())
    chances = p.cumsum(-1, dtype=torch.float64)  # of all that are not certain, up to a factor
    points = (starts[:, None].double() + (slots - certain)) * (chances[:, -1:] / (count - certain))
    found = torch.searchsorted(chances, points, right=True)
    # where all others have a probability of 0, there is no point among them
    ids = torch.where((slots < certain) | (found >= logits.shape[-1]), likeliest, found)
    return log_p.gather(-1, ids).clamp(min=LEAST), ids, threshold.squeeze(-1).log().float()
