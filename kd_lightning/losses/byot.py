"""Be your own teacher: classifiers at a network's lower layers learn from its deepest one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.term import (
    Depth,
    Scheduled,
    Term,
    at_least_float32,
    check_same_shape,
    in_float32,
    masked_mean,
    reduce,
)
from kd_lightning.types import Batch, ModelOutput


@in_float32
def byot(
    exit_logits: Tensor,
    deepest_logits: Tensor,
    labels: Tensor,
    exit_feature: Tensor,
    deepest_feature: Tensor,
    alpha: float = 0.3,
    temperature: float = 3.0,
    hint_weight: float = 0.03,
) -> Tensor:
    r"""The loss of one early exit of a network (Zhang et al. 2019, arXiv 1905.08094, equation 4).

    .. math:: (1 - \alpha) \, \mathrm{CE}(z_i, y)
              + \alpha T^2 \, \mathrm{KL}(\mathrm{softmax}(z_n / T) \,\|\, \mathrm{softmax}(z_i / T))
              + \lambda \frac{1}{D} \sum_d (f_{i,d} - f_{n,d})^2

    for logits z and features f of exit i and of the deepest layer n, averaged over the (for the first part: labelled)
    examples. The deepest ones get no gradient. The paper sums the squares; here it is their mean over the D entries, so
    that the weight does not depend on the width.

    Args:
        exit_logits: z_i, `(B, C)`.
        deepest_logits: z_n, the same shape.
        labels: `(B,)` int64, -100 where there is none.
        exit_feature: f_i, `(B, D)`: what the exit's classifier reads.
        deepest_feature: f_n, the same shape.
        alpha: Between 0 (labels) and 1 (the deepest classifier).
        temperature: T > 0.
        hint_weight: lambda >= 0.

    Raises:
        ValueError: Shapes that differ, or values out of their range.

    Example:
        >>> import torch
        >>> z, f = torch.zeros(1, 4), torch.zeros(1, 8)
        >>> round(byot(z, z, torch.tensor([2]), f, f + 1.0, alpha=0.5, hint_weight=1.0).item(), 6)  # log(4) / 2 + 1
        1.693147
    """
    return _parts(
        exit_logits, deepest_logits, labels, exit_feature, deepest_feature, alpha, temperature, hint_weight
    ).sum()


def _parts(
    exit_logits: Tensor,
    deepest_logits: Tensor,
    labels: Tensor,
    exit_feature: Tensor,
    deepest_feature: Tensor,
    alpha: float,
    temperature: float,
    hint_weight: float,
) -> Tensor:
    """Return the mean over labelled examples and the mean over all, `(2,)`; see `byot`."""
    check_same_shape(exit_logits, deepest_logits)
    check_same_shape(exit_feature, deepest_feature, "features")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if hint_weight < 0:
        raise ValueError(f"hint_weight must not be negative, got {hint_weight}")
    ce = cross_entropy(exit_logits, labels)
    kl = soft_target(exit_logits, deepest_logits, temperature)
    squares = F.mse_loss(exit_feature, deepest_feature.detach(), reduction="none")
    return torch.stack([(1 - alpha) * ce, alpha * kl + hint_weight * reduce(squares.mean(-1), None, "mean")])


class BYOTLoss(Term):
    """Self-distillation of a classifier: the sum of `byot` over its exits.

    Each exit pools its layer's output to a vector (the mean over tokens or over the map), takes it through a hidden
    layer to the deepest layer's width, and classifies that. The exits train with the student but are not part of it:
    only the network is saved and deployed. The network's own logits, the deepest classifier, learn from
    labels by a `CrossEntropyLoss` beside this term. No teacher is needed.

    The paper's exits are convolutions on the map before it is pooled; these serve tokens as well.

    Args:
        kind: Where the layers' outputs are found: `hidden` (transformers) or `feature_maps` (CNNs).
        exits: Layers that get an exit, counted from 0, negative ones from the end; by default all but the last.
        alpha: Weight of the deepest classifier against the labels, or a schedule.
        temperature: T > 0, or a schedule.
        hint_weight: Weight of the squared difference of features.

    Raises:
        ValueError: An unknown kind, and from `plan`: a network of one layer, or exits that it does not have.
    """

    uses_teacher = False

    def __init__(
        self,
        kind: Literal["hidden", "feature_maps"] = "hidden",
        exits: Sequence[int] | None = None,
        alpha: Scheduled = 0.3,
        temperature: Scheduled = 3.0,
        hint_weight: float = 0.03,
    ) -> None:
        super().__init__()
        if kind not in ("hidden", "feature_maps"):
            raise ValueError(f"kind={kind!r}: expected hidden or feature_maps")
        self.kind, self.exits = kind, exits
        self.alpha, self.temperature, self.hint_weight = alpha, temperature, hint_weight
        self.bottlenecks, self.classifiers = nn.ModuleList(), nn.ModuleList()

    def plan(self, student: Depth, teacher: Depth) -> None:
        """Select the layers to read: those with an exit, and the deepest."""
        layers = student(self.kind)
        exits = range(layers - 1) if self.exits is None else self.exits
        chosen = [layer % layers for layer in exits if -layers <= layer < layers - 1 and layer != -1]
        if not chosen or len(chosen) < len(exits):
            raise ValueError(
                f"exits={self.exits}: the student has {layers} layers in {self.kind}; exits stand at one or more of "
                f"the layers 0 to {layers - 2}, below the deepest"
            )
        first = 1 if self.kind == "hidden" else 0  # hidden[0] is what the first layer reads
        self.needs_student = tuple(f"{self.kind}[{layer + first}]" for layer in [*chosen, layers - 1])

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build the exits for the widths and classes that the student has."""
        if student.logits.ndim != 2:
            raise ValueError(f"exits classify whole examples, and the logits are {tuple(student.logits.shape)}")
        *exits, deepest = (masked_mean(student.features[name]).shape[1] for name in self.needs_student)
        for width in exits:
            self.bottlenecks.append(nn.Sequential(nn.Linear(width, deepest), nn.GELU(), nn.Linear(deepest, deepest)))
            self.classifiers.append(nn.Linear(deepest, student.logits.shape[1]))

    def settings(self) -> dict[str, float]:
        """Return the current scheduled values."""
        return {"alpha": self.now(self.alpha), "temperature": self.now(self.temperature)}

    def counts(self, batch: Batch) -> Tensor:
        """Return how many examples are labelled, and how many there are."""
        return torch.cat([self.count(batch, "labels"), self.count(batch, "examples")])

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the sum over the exits."""
        return self.parts(student, teacher, batch).sum()

    def parts(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        """Return the mean over labelled examples and the mean over all, summed over the exits."""
        *lower, deepest = (self._pooled(student.features[name], batch) for name in self.needs_student)
        losses = []
        for vector, bottleneck, classifier in zip(lower, self.bottlenecks, self.classifiers, strict=True):
            feature = bottleneck(vector)
            losses.append(
                _parts(
                    classifier(feature), student.logits, batch["labels"], feature, deepest,
                    self.now(self.alpha), self.now(self.temperature), self.hint_weight,
                )
            )  # fmt: skip
        return torch.stack(losses).sum(0)

    def _pooled(self, feature: Tensor, batch: Batch) -> Tensor:
        mask = batch.get("attention_mask") if feature.ndim == 3 else None
        return masked_mean(at_least_float32(feature), None if mask is None else mask.bool())
