"""MiniLMv2: relations among queries, among keys and among values of one layer each."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_lightning.losses.attentions import relation_kl
from kd_lightning.losses.term import Averages, Reduction, Term, in_float32, token_mask
from kd_lightning.types import Batch, ModelOutput


@in_float32
def minilmv2(
    student_qkv: Tensor,
    teacher_qkv: Tensor,
    relation_heads: int,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of Q-Q, K-K and V-V relations (Wang et al. 2020, arXiv 2012.15828), in nats.

    .. math:: \sum_{X \in \{Q, K, V\}} \frac{1}{A} \sum_{a=1}^A \mathrm{KL}(r^X_{t,a} \| r^X_{s,a}),
              \quad r^X_a = \mathrm{softmax}(X_a X_a^\top / \sqrt{D / A})

    for each position, averaged over those that count. X_a is part a of the A equal parts, the relation heads, that the
    width D is cut into, whatever the number of attention heads: neither heads nor widths need agree. Padding has
    probability 0 on both sides.

    Args:
        student_qkv: One layer's queries, keys and values, heads side by side, `(B, L, 3, D)`.
        teacher_qkv: `(B, L, 3, D')`; gets no gradient.
        relation_heads: A; must divide both widths.
        mask: `(B, L)` bool, True = counts, as a row and as a column.
        reduction: `mean` over what counts, `sum`, or `none` for one value a position, `(B, L)`.

    Raises:
        ValueError: Other shapes, positions that differ, or a width that A does not divide.

    Example:
        >>> import torch
        >>> student = torch.zeros(1, 2, 3, 1)
        >>> teacher = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]).view(1, 2, 3, 1)
        >>> f"{minilmv2(student, teacher, relation_heads=1).item():.4f}"  # log 2 - H(sigmoid(2))
        '0.3278'
    """
    for side, x in (("student", student_qkv), ("teacher", teacher_qkv)):
        if x.ndim != 4 or x.shape[2] != 3:
            raise ValueError(f"{side} queries, keys and values {tuple(x.shape)} must be (B, L, 3, D)")
    pairs = zip(student_qkv.unbind(2), teacher_qkv.unbind(2), strict=True)
    return torch.stack([relation_kl(s, t, relation_heads, mask, reduction) for s, t in pairs]).sum(0)


class MiniLMv2Loss(Term):
    """Multi-head self-attention relations; see `minilmv2` for the formula.

    Args:
        relation_heads: A; must divide both networks' widths. The paper has 48 and 64, more than the networks' heads.
        teacher_layer: Counted from 0, or from the end if negative. The paper takes the last of a base-sized teacher
            and the 21st of 24 of a large one. The student's is its last.
    """

    averages: Averages = "tokens"
    needs_student = ("qkv[-1]",)

    def __init__(self, relation_heads: int = 48, teacher_layer: int = -1) -> None:
        super().__init__()
        self.relation_heads = relation_heads
        self.needs_teacher = (f"qkv[{teacher_layer}]",)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the sum of the three divergences over the positions that count."""
        pair = student.features["qkv[-1]"], teacher.features[self.needs_teacher[0]]
        return minilmv2(*pair, self.relation_heads, mask=token_mask(batch, *pair))
