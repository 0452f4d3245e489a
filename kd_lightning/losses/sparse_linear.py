"""Computes `sparse_linear_kd` for a chunk of the student's logits; formulas in `sparse`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_lightning.losses.chunked_linear import blockwise
from kd_lightning.losses.term import at_least_float32


@dataclass
class SparseTeacher:
    """A teacher's log probabilities of some classes and of all others together.

    Attributes:
        log_probs: `(N, K + 1)`, the last of the others, or of drawn classes the threshold; `(N, V)` where there are
            no others.
        ids: Which classes, `(N, K)`.
        ce_weight: Weight of the cross-entropy.
        kd_weight: Weight of the divergence.
        divergence: From both sides' log probabilities, the student's first, to a value for each row.
    """

    log_probs: Tensor
    ids: Tensor
    ce_weight: float
    kd_weight: float
    divergence: Callable[[Tensor, Tensor], Tensor]

    def begin(self, rows: int) -> None:
        """Need no room."""

    def values_and_gradient(
        self, z_s: Tensor, pick: Tensor | slice, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare over the K classes and the tail."""
        log_probs, ids = self.log_probs[pick], self.ids[pick]

        def block(at: slice) -> tuple[Tensor, Tensor, Tensor]:
            return self._block(z_s[at], log_probs[at], ids[at], None if labels is None else labels[at])

        return block(slice(None)) if z_s.is_cuda else blockwise(z_s, block)

    def _block(
        self, z_s: Tensor, log_t: Tensor, ids: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return values and gradient, for the merged classes and then for each class of the tail.

        With l the log-sum-exp of the tail's logits, the merged logits are `(z_1, ..., z_K, l)`, and dl / dz_j is the
        softmax over the tail alone.
        """
        z = at_least_float32(z_s)
        z = z.sub_(z.amax(1, keepdim=True))  # large logits then lose nothing to rounding
        merged = z.gather(1, ids)
        right = None if labels is None else z.gather(1, labels[:, None])[:, 0]
        share = z.scatter_(1, ids, -math.inf)
        if log_t.shape[1] > ids.shape[1]:
            top = share.amax(1, keepdim=True)
            total = share.sub_(top).exp_().sum(1, keepdim=True)
            share.div_(total)
            merged = torch.cat([merged, top + total.log()], dim=1)
        with torch.enable_grad():
            leaf = merged.detach().requires_grad_()
            kd = self.divergence(leaf.log_softmax(1), log_t.to(leaf.dtype))
            (gradient,) = torch.autograd.grad(kd.sum(), leaf)
        gradient = self.kd_weight * gradient
        ce = z.new_zeros(len(z))
        if right is not None:
            top = merged.amax(1, keepdim=True)
            p = (merged - top).exp()
            total = p.sum(1, keepdim=True)
            ce = total.log()[:, 0] + (top[:, 0] - right)
            gradient += self.ce_weight * p / total
        share = share.mul_(gradient[:, -1:]) if gradient.shape[1] > ids.shape[1] else share.zero_()
        share.scatter_(1, ids, gradient[:, : ids.shape[1]])
        if labels is not None:
            share.scatter_add_(1, labels[:, None], share.new_full((len(share), 1), -self.ce_weight))
        return ce, kd.detach(), share.to(z_s.dtype)
