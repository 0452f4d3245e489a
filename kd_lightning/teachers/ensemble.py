"""Several teachers combined into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput

Combine = Literal["probabilities", "logits"]
Weights = Sequence[float] | Literal["confidence"] | None


class EnsembleTeacher(Teacher):
    r"""The weighted mean of several teachers' outputs.

    With the members' logits :math:`z_m` and weights :math:`w_m`, scaled to sum to 1:

    * `probabilities`: :math:`\log \sum_m w_m \, \mathrm{softmax}(z_m)`, whose softmax at temperature 1 is the mean of
      the members' probabilities;
    * `logits`: :math:`\sum_m w_m \, z_m`, whose softmax is their normalised geometric mean.

    With `weights="confidence"` each example has its own weights, by a member's distance from a uniform distribution:
    :math:`w_m \propto 1 - H(\mathrm{softmax}(z_m)) / \log C`, with the entropy H in nats.

    Each member may run or use its own cache. Features are not combined: the members' may differ in shape.

    Args:
        members: At least one teacher.
        weights: One number >= 0 for each member, or `confidence`; by default all are equal. `fit_weights` finds them
            from labels.
        combine: What is averaged.

    Raises:
        ConfigError: No member, weights that do not fit them, or an unknown `combine`.
    """

    def __init__(self, members: Sequence[Teacher], weights: Weights = None, combine: Combine = "probabilities") -> None:
        self.members, self.combine = list(members), combine
        self.weights = shares_of(weights, len(members), combine)

    def __call__(self, batch: Batch) -> ModelOutput:
        """Run every member and return the combined logits in float32.

        Raises:
            ConfigError: Members with different numbers of classes, or starts and ends of spans without `logits` and
                weights of numbers.
        """
        self.refuse_spans(batch)
        outputs = [member(batch).logits for member in self.members]
        return ModelOutput(combined(outputs, self.weights, self.combine))

    def refuse_spans(self, batch: Batch) -> None:
        """Refuse probabilities of classes of a batch whose logits are of starts and ends of spans.

        Raises:
            ConfigError: Names the key.
        """
        if "question" in batch:
            check_scores("confidence" if self.weights is None else self.weights, self.combine)

    def to(self, device: torch.device) -> Self:
        """Move every member to a device."""
        self.members = [member.to(device) for member in self.members]
        return self

    def flush(self) -> None:
        """Flush every member."""
        for member in self.members:
            member.flush()


class EnsembleNetwork(nn.Module):
    """Several networks combined like `EnsembleTeacher`, for code that measures or runs one network.

    Args:
        members: At least one network, all of which read the same batch.
        weights: As for `EnsembleTeacher`.
        combine: As for `EnsembleTeacher`.

    Raises:
        ConfigError: As `EnsembleTeacher`.
    """

    def __init__(
        self, members: Sequence[nn.Module], weights: Weights = None, combine: Combine = "probabilities"
    ) -> None:
        super().__init__()
        self.members, self.combine = nn.ModuleList(members), combine
        self.weights = shares_of(weights, len(members), combine)

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Run every member on the batch and return the combined logits in float32."""
        outputs = [run_network(member, batch).logits for member in self.members]
        return ModelOutput(combined(outputs, self.weights, self.combine))


def fit_weights(logits: Tensor, labels: Tensor, combine: Combine = "probabilities") -> list[float]:
    """Return the members' weights that minimise the ensemble's cross-entropy with the labels.

    The problem is convex for both values of `combine`; L-BFGS solves it over the softmax of free numbers, starting from
    equal weights.

    Args:
        logits: Each member's, `(M, N, C)`, on examples that none was trained on.
        labels: `(N,)` int64, all of them classes.
        combine: As for `EnsembleTeacher`.
    """
    logits, labels = logits.double().clone(), labels.clone()  # autograd takes no tensors made in inference mode
    free = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(_mix(logits, free.softmax(0).view(-1, 1), combine), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return [float(weight) for weight in free.softmax(0).detach()]


def shares_of(weights: Weights, count: int, combine: str) -> list[float] | None:
    """Check the settings of an ensemble and return its weights, scaled to sum to 1; None for `confidence`.

    Raises:
        ConfigError: No member, weights that do not fit them, or an unknown `combine`.
    """
    if not count:
        raise ConfigError("an ensemble needs at least one teacher")
    if combine not in get_args(Combine):
        raise ConfigError(f"teacher.combine={combine!r} is unknown{did_you_mean(str(combine), get_args(Combine))}")
    if weights == "confidence":
        return None
    if isinstance(weights, str):
        raise ConfigError(f"teacher.weights={weights!r}: give confidence, learned, or a number for each member")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ConfigError(f"teacher.weights has {len(weights)} numbers for {count} members: give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) == 0:
        raise ConfigError(f"teacher.weights={weights}: give numbers of at least 0, not all of them 0")
    return [weight / sum(weights) for weight in weights]


def combined(outputs: list[Tensor], shares: list[float] | None, combine: Combine) -> Tensor:
    """Combine the members' logits into `(..., C)` float32; `shares` None: weights by confidence.

    Raises:
        ConfigError: Logits for different numbers of classes.
    """
    first = outputs[0]
    for number, other in enumerate(outputs):
        if other.shape != first.shape:
            raise ConfigError(
                f"teacher.checkpoint: the members do not fit together: member 0 has {first.shape[-1]} classes "
                f"(logits {tuple(first.shape)}), member {number} has {other.shape[-1]} (logits {tuple(other.shape)})"
            )
    logits = torch.stack(outputs).float()
    if shares is None:
        return _mix(logits, _confidence(logits), combine)
    return _mix(logits, logits.new_tensor(shares).view(-1, *[1] * (first.ndim - 1)), combine)


def check_scores(weights: Weights | Literal["learned"], combine: Combine) -> None:
    """Refuse settings that need probabilities of classes for an ensemble of regressions, or of spans.

    Raises:
        ConfigError: Names the key.
    """
    if combine == "probabilities":
        raise ConfigError(
            "teacher.combine=probabilities: teachers that predict scores, or starts and ends of spans, have none: "
            "use logits"
        )
    if isinstance(weights, str):
        raise ConfigError(
            f"teacher.weights={weights} needs probabilities of classes, and the teachers predict scores or spans: give "
            "numbers"
        )


def _mix(logits: Tensor, weights: Tensor, combine: Combine) -> Tensor:
    """Combine `(M, ..., C)` with weights `(M, ...)`, or broadcastable ones, that sum to 1 over M."""
    weights = weights.unsqueeze(-1)
    if combine == "logits":
        return (weights * logits).sum(0)
    return (logits.log_softmax(-1) + weights.log()).logsumexp(0)


def _confidence(logits: Tensor) -> Tensor:
    """Return each member's share `(M, ...)`; equal shares if all members predict uniform distributions."""
    log_probs = logits.log_softmax(-1)
    certainty = 1 + (log_probs.exp() * log_probs).sum(-1) / math.log(logits.shape[-1])
    certainty = certainty.clamp(min=torch.finfo(logits.dtype).eps)
    return certainty / certainty.sum(0)
