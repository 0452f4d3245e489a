r"""Distillation over large vocabularies from hidden states and output matrices, without their logits.

The logits of N tokens over V words are an N x V matrix for each side, and a loss written with them keeps several more
for its backward pass. Here a chunk of tokens goes from hidden states to gradients at once, in the forward pass, and its
logits are dropped; the backward pass multiplies the finished gradients by the upstream one. Fusing the last linear
layer with its loss chunk by chunk is the idea of Hsu et al. 2024 (Liger Kernel, arXiv 2410.10989).

With logits z = W h + b of each side, p = softmax(z / T), and q the label's (smoothed) distribution, a token's loss is

.. math:: \ell = w_{ce} \, \mathrm{CE}(q, \mathrm{softmax}(z_s)) + w_{kd} \, T^2 D(p_t, p_s)

* `forward_kl`: :math:`D = \mathrm{KL}(p_t \| p_s)`, and :math:`T^2 \, \partial D / \partial z_s = T (p_s - p_t)`
* `reverse_kl`: :math:`D = \mathrm{KL}(p_s \| p_t)`, and :math:`T \, p_s (\log(p_s / p_t) - D)`
* `jsd`: :math:`D = \beta \mathrm{KL}(p_t \| m) + (1 - \beta) \mathrm{KL}(p_s \| m)` with
  :math:`m = \beta p_t + (1 - \beta) p_s`, and :math:`T (1 - \beta) \, p_s (\log(p_s / m) - \mathrm{KL}(p_s \| m))`
  (Agarwal et al. 2023, arXiv 2306.13649)

and :math:`\partial \mathrm{CE} / \partial z_s = \mathrm{softmax}(z_s) - q`. From G, these rows stacked (N, V), follow
:math:`G W_s` (N, H) for hidden states, :math:`G^\top h_s` (V, H) for the matrix, :math:`G^\top 1` (V,) for the bias.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kd_lightning.losses.chunked_linear import Options, fused_linear
from kd_lightning.losses.term import Scheduled, Term, kept_rows
from kd_lightning.types import Batch, ModelOutput

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


class FusedLoss(NamedTuple):
    """A loss and its unweighted parts, scalars: `loss` is `ce_weight` x `ce` + `kd_weight` x `kd`.

    Attributes:
        loss: The only one with a graph.
        ce: The cross-entropy; not computed and 0 where `ce_weight` is 0.
        kd: The divergence, T^2 included.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def fused_linear_kd(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_matrix: Tensor,
    teacher_matrix: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    classes: int | None = None,
    count: Tensor | float | None = None,
) -> FusedLoss:
    r"""Cross-entropy with the labels and divergence from the teacher, without ever holding N x V logits.

    .. math:: \frac{1}{n} \sum_{i=1}^{n} \ell_i

    over the n positions that count, with the token's loss and its gradients as at the top of this file. Equals
    `cross_entropy` and `soft_target` of the logits to rounding. Where nothing counts it is 0 with a graph.

    Beside the inputs and their gradients it holds two buffers of `CHUNK_BYTES`. Positions that do not count are left
    out before the first matrix product. Products are done in the inputs' precision, or autocast's; softmax math and the
    sum of gradients over chunks in float32 (float64 for float64 inputs). Where no gradient is needed (frozen inputs,
    `no_grad`) its product is skipped. There is no second derivative. Under `torch.compile` this is a graph break and
    runs as it is, because the number of rows that count depends on the data.

    Args:
        student_hidden: `(N, H)` or `(B, L, H)`.
        teacher_hidden: The same positions; its width may differ. Gets no gradient.
        student_matrix: `(V, H)`, the weight of the output layer; may be tied with the embedding.
        teacher_matrix: The same of the teacher.
        labels: `(N,)` or `(B, L)` int64: what each position predicts. A position with -100 does not count.
        mask: `(N,)` or `(B, L)` bool: a position with False does not count.
        student_bias: `(V,)`.
        teacher_bias: `(V,)`.
        ce_weight: Weight of the cross-entropy, which is always at T = 1 and over all words of the student.
        kd_weight: Weight of T^2 D.
        temperature: T > 0; larger is softer.
        divergence: Which D.
        beta: The teacher's share of m, in (0, 1).
        label_smoothing: epsilon in [0, 1), as in `cross_entropy`.
        classes: D compares the first `classes` words only, for vocabularies that differ only in padding ids at the end.
        count: Divide by this instead of n: for a mean over all tokens of several accumulation steps, their number;
            under DDP, which averages gradients over ranks, the number on all ranks divided by the number of ranks.

    Raises:
        ValueError: Shapes that do not fit, vocabularies of different sizes without `classes`, no labels for the
            cross-entropy, or a number out of its range.

    Example:
        >>> import torch
        >>> hidden, matrix = torch.eye(2), torch.zeros(4, 2)
        >>> fused_linear_kd(hidden, hidden, matrix, matrix, torch.tensor([1, -100])).ce.item()  # log 4
        1.3862943649291992
    """
    positions, sizes = student_hidden.shape[:-1], (len(student_matrix), len(teacher_matrix))
    _check_shapes(positions, teacher_hidden=teacher_hidden[..., 0], labels=labels, mask=mask)
    _check_classes(classes, *sizes)
    if ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight is {ce_weight}, but there are no labels; without labels it must be 0")
    options = Options(ce_weight, kd_weight, temperature, divergence, beta, label_smoothing, classes or sizes[0])
    student = student_hidden, student_matrix, student_bias
    teacher = teacher_hidden.detach(), teacher_matrix.detach(), teacher_bias
    return FusedLoss(*fused_linear(student, teacher, labels, mask, options, count))


def chunked_soft_target(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_matrix: Tensor,
    teacher_matrix: Tensor,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    classes: int | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """T^2 D alone, averaged over the positions that count: `soft_target` of the logits without them.

    See `fused_linear_kd` for the formula, every argument and the errors.
    """
    return fused_linear_kd(
        student_hidden, teacher_hidden, student_matrix, teacher_matrix, None, mask, student_bias=student_bias,
        teacher_bias=teacher_bias, ce_weight=0.0, kd_weight=1.0, temperature=temperature, divergence=divergence,
        beta=beta, classes=classes, count=count,
    ).loss  # fmt: skip


class FusedLinearKDLoss(Term):
    """`fused_linear_kd` for language models that output their last hidden states instead of logits.

    Both sides' `features` must hold `last_hidden` `(B, L, H)` and `head` `(V, H)`, the output layer's weight itself
    (not detached), and may hold `head_bias` `(V,)`. Their `logits` are not read: a model made for this term leaves out
    its output layer and may give any small tensor for them. Positions count as for `SoftTargetLoss`, and those
    without a label only where `ce_weight` is 0.

    Args:
        temperature: T > 0, or a schedule over training progress.
        ce_weight: Weight of the cross-entropy with the batch's labels.
        kd_weight: Weight of T^2 D.
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        beta: The teacher's share of the mixture of `jsd`.
        label_smoothing: epsilon in [0, 1).
        classes: Compare only the first `classes` words of each side, as in `SoftTargetLoss`.

    Raises:
        ValueError: At the first batch: a feature that is missing, or what `fused_linear_kd` refuses.
    """

    def __init__(
        self,
        temperature: Scheduled = 1.0,
        ce_weight: float = 0.5,
        kd_weight: float = 0.5,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        label_smoothing: float = 0.0,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.ce_weight, self.kd_weight = temperature, ce_weight, kd_weight
        self.divergence, self.beta = divergence, beta
        self.label_smoothing, self.classes = label_smoothing, classes
        self.averages = "labels" if ce_weight != 0 else "logits"

    def settings(self) -> dict[str, float]:
        """Return the current temperature."""
        return {"temperature": self.now(self.temperature)}

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the weighted sum, averaged over valid positions."""
        for side, output in (("student", student), ("teacher", teacher)):
            if missing := {"last_hidden", "head"} - output.features.keys():
                raise ValueError(f"the {side}'s features {sorted(output.features)} lack {sorted(missing)}")
        hidden, above = student.features["last_hidden"], teacher.features["last_hidden"]
        labels = batch.get("labels") if self.ce_weight != 0 else None
        return fused_linear_kd(
            hidden, above, student.features["head"], teacher.features["head"], labels, kept_rows(hidden, batch),
            student_bias=student.features.get("head_bias"), teacher_bias=teacher.features.get("head_bias"),
            ce_weight=self.ce_weight, kd_weight=self.kd_weight, temperature=self.now(self.temperature),
            divergence=self.divergence, beta=self.beta, label_smoothing=self.label_smoothing, classes=self.classes,
        ).loss  # fmt: skip


def _check_shapes(positions: torch.Size, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != positions:
            raise ValueError(
                f"{name} is for positions {tuple(tensor.shape)}, but the student's hidden states are for "
                f"{tuple(positions)}"
            )


def _check_classes(classes: int | None, student: int, teacher: int) -> None:
    if classes is None and student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student} words and the teacher's {teacher}: they are compared word by "
            "word. If they differ only in padding ids at the end, set `classes` to the real number"
        )
    if classes is not None and not 0 < classes <= min(student, teacher):
        raise ValueError(f"classes={classes}, but the student has {student} and the teacher {teacher}")
