r"""Divergences from a sparse teacher: its K largest log probabilities and the mass of all others.

A large vocabulary's logits are too many to keep for each token, and most are nearly nothing. Student and teacher are
compared over K + 1 classes: the teacher's K largest, and all others as one (the tail),

.. math:: p = (p_{i_1}, \ldots, p_{i_K}, 1 - \textstyle\sum_k p_{i_k}), \quad
          q = (q_{i_1}, \ldots, q_{i_K}, 1 - \textstyle\sum_k q_{i_k})

with p the teacher's, q the student's softmax at temperature 1. Merging classes never makes a divergence larger, and at
K = V it is the dense one. The tail is not optional: without it the student is free to move mass out of the K classes,
which reverse KL even rewards. Its log mass is a log-sum-exp over the other logits, never the logarithm of a difference.

At another temperature the tail's mass does not follow from what is kept, so there is none here.

Of classes that were drawn (`kd_lightning.teachers.sampled`) with weights w there is forward KL alone,

.. math:: \sum_{i \in S} w_i (\log p_i - \log q_i),

whose mean over draws is that over all V classes, and so is its gradient's. The other divergences are no sum over the
teacher's distribution: an estimate of them from drawn classes would be biased.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kd_lightning.losses.chunked_linear import chunked_sums
from kd_lightning.losses.fused_linear import FusedLoss
from kd_lightning.losses.logit_term import check_labels, half_distance, jsd, kl, skewed
from kd_lightning.losses.merged import merged
from kd_lightning.losses.sparse_linear import SparseTeacher
from kd_lightning.losses.term import (
    Averages,
    Reduction,
    Term,
    at_least_float32,
    check_mask,
    in_float32,
    kept_rows,
    only_counted,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput, SparseLogits

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]


@in_float32
def sparse_kd(
    student_logits: Tensor,
    teacher: SparseLogits,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence from a sparse teacher, in nats, over K + 1 classes; see the top of this file.

    Args:
        student_logits: `(N, V)` or `(B, L, V)`, finite.
        teacher: The same rows in sparse form. It gets no gradient. Of drawn classes, `forward_kl` is the estimate.
        divergence: `forward_kl`, KL(p || q), as `soft_target`; `reverse_kl`, KL(q || p); `jsd` as `generalized_jsd`;
            `skew_kl` and `skew_reverse_kl` as `skew_kl` in both directions; `total_variation`.
        beta: Of `jsd` the teacher's share of the mixture, in (0, 1); of the skew divergences their skew, in [0, 1).
        mask: `(N,)` or `(B, L)` bool, True = counts.
        reduction: `mean` over what counts, `sum`, or `none` for one value a row.

    Raises:
        ValueError: Rows or classes that do not fit, an unknown divergence, one that drawn classes do not give, or a
            beta out of its range.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> [round(sparse_kd(student, SparseLogits.of(teacher, k)).item(), 4) for k in (1, 2, 4)]
        [0.344, 0.4255, 0.4388]
    """
    check_divergence(divergence, beta)
    check_rows(student_logits.shape, teacher, divergence)
    check_mask(mask, student_logits.shape[:-1])
    log_s = merged(student_logits, teacher.ids, mask=mask)[0]
    return reduce(_divergences(log_s, teacher, divergence, beta, mask), mask, reduction)


def _divergences(
    log_s: Tensor, teacher: SparseLogits, divergence: Divergence, beta: float, mask: Tensor | None
) -> Tensor:
    """Return the divergence of each row, of the student's log probabilities of K classes and the tail."""
    log_t = teacher_buckets(teacher, mask).to(log_s.dtype)
    return expected_kl(log_s, log_t) if teacher.drawn else compare(log_s, log_t, divergence, beta)


def sparse_linear_kd(
    student_hidden: Tensor,
    student_matrix: Tensor,
    teacher: SparseLogits,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    count: Tensor | float | None = None,
) -> FusedLoss:
    """`sparse_kd` and cross-entropy with the labels from hidden states, without ever holding N x V logits.

    Chunk by chunk as `fused_linear_kd`, where precision, memory and `count` are described. Equals `sparse_kd` and
    `cross_entropy` of the logits to rounding. Where nothing counts it is 0 with a graph.

    Args:
        student_hidden: `(N, H)` or `(B, L, H)`.
        student_matrix: `(V, H)`, the weight of the output layer.
        teacher: The same positions in sparse form.
        labels: `(N,)` or `(B, L)` int64: what each position predicts. A position with -100 does not count.
        mask: `(N,)` or `(B, L)` bool: a position with False does not count.
        student_bias: `(V,)`.
        ce_weight: Weight of the cross-entropy.
        kd_weight: Weight of the divergence.
        divergence: As for `sparse_kd`.
        beta: As for `sparse_kd`.
        count: Divide by this instead of the number of positions that count.

    Raises:
        ValueError: As `sparse_kd`, or no labels for the cross-entropy.

    Example:
        >>> import torch
        >>> hidden, matrix = torch.eye(2), torch.zeros(4, 2)
        >>> same = SparseLogits.of(torch.zeros(2, 4), 3)
        >>> sparse_linear_kd(hidden, matrix, same, torch.tensor([1, -100]), ce_weight=1.0).loss.item()  # log 4
        1.3862943649291992
    """
    check_divergence(divergence, beta)
    check_rows(torch.Size([*student_hidden.shape[:-1], len(student_matrix)]), teacher, divergence)
    check_mask(mask, student_hidden.shape[:-1])
    if ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight is {ce_weight}, but there are no labels; without labels it must be 0")
    buckets = teacher_buckets(teacher, mask)
    flat = SparseTeacher(
        buckets.reshape(-1, buckets.shape[-1]), teacher.ids.reshape(-1, teacher.ids.shape[-1]), ce_weight, kd_weight,
        expected_kl if teacher.drawn else lambda log_s, log_t: compare(log_s, log_t, divergence, beta),
    )  # fmt: skip
    student = student_hidden, student_matrix, student_bias
    return FusedLoss(*chunked_sums(student, flat, labels if ce_weight != 0 else None, mask, count))


def compare(log_s: Tensor, log_t: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """Return the divergence of each row, of log probabilities whose classes are the same."""
    if divergence == "forward_kl":
        return kl(log_t, log_s)
    if divergence == "reverse_kl":
        return kl(log_s, log_t)
    if divergence == "jsd":
        return jsd(log_t, log_s, beta)
    if divergence == "skew_kl":
        return skewed(log_t, log_s, beta)
    return skewed(log_s, log_t, beta) if divergence == "skew_reverse_kl" else half_distance(log_t, log_s)


def expected_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return the estimate of KL(p || q) of each row from drawn classes.

    Args:
        log_s: The student's log probabilities of these classes and, last, of all others.
        log_t: The teacher's and, last, the logarithm of the threshold, as `teacher_buckets` returns them.
    """
    log_p, threshold = log_t[..., :-1], log_t[..., -1:]
    # they sum to 1; what is stored is rounded
    weights = torch.maximum(log_p, threshold).softmax(-1)
    return (weights * (log_p - log_s[..., :-1])).sum(-1)


def bucketed(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log probabilities of some classes and of the tail of all others, `(..., K + 1)`."""
    return merged(logits, ids)[0]


def teacher_buckets(teacher: SparseLogits, mask: Tensor | None) -> Tensor:
    """Return a sparse teacher's log probabilities with the tail, `(..., K + 1)`, or `(..., V)`.

    Of drawn classes they are as they were stored, and the last one is the threshold's.
    """
    values = teacher.values.detach()
    if values.shape[-1] < teacher.classes:
        values = torch.cat([at_least_float32(values), at_least_float32(teacher.rest.detach())[..., None]], dim=-1)
    values = only_counted(at_least_float32(values), mask)
    return values if teacher.drawn else values.log_softmax(-1)


def check_divergence(divergence: str, beta: float) -> None:
    """Refuse a divergence or a beta that there is not."""
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, got {divergence!r}")
    if not 0.0 <= beta < 1.0 or (divergence == "jsd" and beta == 0.0):
        raise ValueError(f"beta must be in [0, 1), for jsd in (0, 1), got {beta}")


def check_rows(shape: torch.Size, teacher: SparseLogits, divergence: Divergence) -> None:
    """Refuse a sparse teacher of other rows or classes than a student's logits, or without a divergence."""
    if teacher.drawn and divergence != "forward_kl":
        raise ValueError(
            f"divergence={divergence} is no mean over the teacher's distribution, and drawn classes would give a "
            "biased one: use forward_kl, or keep the likeliest and the tail (teacher.cache_top_k)"
        )
    if teacher.ids.shape[:-1] != shape[:-1]:
        raise ValueError(
            f"the student has rows {tuple(shape[:-1])} and the sparse teacher {tuple(teacher.ids.shape[:-1])}: they "
            "must be the same"
        )
    if teacher.classes != shape[-1]:
        raise ValueError(
            f"the student has {shape[-1]} classes and the sparse teacher {teacher.classes}: its ids and its tail are "
            "those of its own vocabulary"
        )


class SparseKDLoss(Term):
    """Distillation from K log probabilities of a teacher: the largest with the tail, or drawn ones.

    See `sparse_kd`.

    The teacher's output has them in `sparse`. One that has logits is cut to `top_k` of them here, so that a running
    teacher teaches what a stored one does. A student that leaves out its output layer (logits `(B, L, 0)`) is compared
    chunk by chunk, from its features `last_hidden` and `head`.

    Args:
        top_k: K, for a teacher that gives all its logits.
        divergence: As for `sparse_kd`.
        beta: As for `sparse_kd`.

    Raises:
        ValueError: At the first batch: a feature that is missing, or what `sparse_kd` refuses.
    """

    averages: Averages = "logits"

    def __init__(self, top_k: int = 32, divergence: Divergence = "forward_kl", beta: float = 0.5) -> None:
        super().__init__()
        check_divergence(divergence, beta)
        if top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {top_k}")
        self.top_k, self.divergence, self.beta = top_k, divergence, beta

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the divergence, averaged over the rows that count."""
        if student.logits.shape[-1]:
            mask = kept_rows(student.logits, batch)
            return sparse_kd(student.logits, self._sparse(teacher), self.divergence, self.beta, mask)
        return self._chunked(student, teacher, batch).loss

    def with_labels(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch, ce_weight: float, kd_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and divergence from one pass over the student's logits or output layer.

        Of a student without logits, the gradient of both together, `ce_weight * ce + kd_weight * kd`, is that of the
        sum; all of it is the divergence's here, and neither has a gradient of its own.
        """
        if student.logits.shape[-1]:
            sparse, mask = self._sparse(teacher), kept_rows(student.logits, batch)
            check_rows(student.logits.shape, sparse, self.divergence)
            check_labels(batch["labels"], student.logits)
            log_s, right = merged(student.logits, sparse.ids, batch["labels"], mask)
            kd = _divergences(log_s, sparse, self.divergence, self.beta, mask)
            assert right is not None
            return reduce(-right, mask, "mean"), reduce(kd, mask, "mean")
        both = self._chunked(student, teacher, batch, ce_weight, kd_weight)
        return both.ce, both.kd + (both.loss - both.loss.detach()) / kd_weight

    def _sparse(self, teacher: ModelOutput) -> SparseLogits:
        if teacher.sparse is not None:
            return teacher.sparse
        logits = at_least_float32(teacher.logits.detach())
        logits = logits - logits.amax(-1, keepdim=True)  # large ones lose nothing to rounding
        return SparseLogits.of(logits, min(self.top_k, logits.shape[-1]))

    def _chunked(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch, ce_weight: float = 0.0, kd_weight: float = 1.0
    ) -> FusedLoss:
        if missing := {"last_hidden", "head"} - student.features.keys():
            raise ValueError(f"the student's logits are empty, and its features lack {sorted(missing)}")
        hidden = student.features["last_hidden"]
        return sparse_linear_kd(
            hidden, student.features["head"], self._sparse(teacher), batch.get("labels") if ce_weight else None,
            kept_rows(hidden, batch), student_bias=student.features.get("head_bias"), ce_weight=ce_weight,
            kd_weight=kd_weight, divergence=self.divergence, beta=self.beta,
        )  # fmt: skip
