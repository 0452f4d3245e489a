"""MiniLM: attention and value relations of the last layers."""

from __future__ import annotations

from torch import Tensor

from kd_lightning.losses.attentions import attention_kl, relation_kl
from kd_lightning.losses.term import Averages, Reduction, Term, in_float32, token_mask
from kd_lightning.types import Batch, ModelOutput


@in_float32
def minilm(
    student_attention: Tensor,
    teacher_attention: Tensor,
    student_values: Tensor,
    teacher_values: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of attentions and of value relations (Wang et al. 2020, arXiv 2002.10957), in nats.

    .. math:: \frac{1}{H} \sum_h \mathrm{KL}(a_{t,h} \| a_{s,h}) + \mathrm{KL}(r_{t,h} \| r_{s,h}),
              \quad r_h = \mathrm{softmax}(V_h V_h^\top / \sqrt{d})

    for each query, with attention probabilities a and a head's values V, averaged over the queries that count. Padding
    keys have probability 0 on both sides. The heads' widths d may differ, so that the student needs no projector; the
    numbers of heads must not. Attention probabilities below 1e-12 count as 1e-12 in the logarithm.

    Args:
        student_attention: `(B, H, L, L)`, rows sum to 1.
        teacher_attention: The same shape; gets no gradient.
        student_values: V of all heads side by side, `(B, L, D)`.
        teacher_values: `(B, L, D')`; gets no gradient.
        mask: `(B, L)` bool, True = counts, as a query and as a key.
        reduction: `mean` over what counts, `sum`, or `none` for one value a query, `(B, L)`.

    Raises:
        ValueError: Numbers of heads or shapes that differ, or heads that do not divide a width.

    Example:
        >>> import torch
        >>> half, values = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]]), torch.eye(2).unsqueeze(0)
        >>> f"{minilm(half, torch.eye(2).view(1, 1, 2, 2), values, values).item():.4f}"  # log 2
        '0.6931'
    """
    attentions = attention_kl(student_attention, teacher_attention, mask, reduction)
    return attentions + relation_kl(student_values, teacher_values, student_attention.shape[1], mask, reduction)


class MiniLMLoss(Term):
    """Deep self-attention distillation of the last layers; see `minilm` for the formula."""

    averages: Averages = "tokens"
    needs_student = ("attention[-1]", "qkv[-1]")
    needs_teacher = ("attention[-1]", "qkv[-1]")

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return both divergences over the queries that count."""
        attentions = student.features["attention[-1]"], teacher.features["attention[-1]"]
        values = student.features["qkv[-1]"][:, :, 2], teacher.features["qkv[-1]"][:, :, 2]
        return minilm(*attentions, *values, mask=token_mask(batch, *values))
