"""Several teachers that answer as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from kd_lightning.errors import ConfigError, did_you_mean
from kd_lightning.models.adapt import run_network
from kd_lightning.teachers.frozen import Teacher
from kd_lightning.types import Batch, ModelOutput

Combine = Literal["probabilities", "logits"]


class EnsembleTeacher:
    r"""The weighted mean of several teachers' answers.

    With the members' logits :math:`z_m` and weights :math:`w_m`, scaled to sum to 1:

    * `probabilities`: :math:`\log \sum_m w_m \, \mathrm{softmax}(z_m)`, whose softmax at temperature 1 is the mean of
      the members' probabilities;
    * `logits`: :math:`\sum_m w_m \, z_m`, whose softmax is their normalised geometric mean.

    Each member may run or answer from its own cache. Features are not combined: the members' may differ in shape.

    Args:
        members: At least one teacher.
        weights: One number >= 0 for each member; by default all are equal.
        combine: What is averaged.

    Raises:
        ConfigError: No member, weights that do not fit them, or an unknown `combine`.
    """

    def __init__(
        self, members: Sequence[Teacher], weights: Sequence[float] | None = None, combine: Combine = "probabilities"
    ) -> None:
        self.members, self.combine = list(members), combine
        self.weights = _shares(weights, len(members), combine)

    def __call__(self, batch: Batch) -> ModelOutput:
        """Ask every member and return the combined logits in float32.

        Raises:
            ConfigError: Members that answer for different numbers of classes.
        """
        answers = [member(batch).logits for member in self.members]
        return ModelOutput(_combined(answers, self.weights, self.combine))

    def to(self, device: torch.device) -> Self:
        """Move every member to a device."""
        self.members = [member.to(device) for member in self.members]
        return self

    def flush(self) -> None:
        """Have every member write what it has not written yet."""
        for member in self.members:
            member.flush()


class EnsembleNetwork(nn.Module):
    """Several networks as one, combined as `EnsembleTeacher` does: for where a network is measured or asked as a whole.

    Args:
        members: At least one network, all of which read the same batch.
        weights: As for `EnsembleTeacher`.
        combine: As for `EnsembleTeacher`.

    Raises:
        ConfigError: As `EnsembleTeacher`.
    """

    def __init__(
        self, members: Sequence[nn.Module], weights: Sequence[float] | None = None, combine: Combine = "probabilities"
    ) -> None:
        super().__init__()
        self.members, self.combine = nn.ModuleList(members), combine
        self.weights = _shares(weights, len(members), combine)

    def forward(self, **batch: Tensor) -> ModelOutput:
        """Run every member on the entries that it names and return the combined logits in float32."""
        answers = [run_network(member, batch).logits for member in self.members]
        return ModelOutput(_combined(answers, self.weights, self.combine))


def _shares(weights: Sequence[float] | None, count: int, combine: str) -> list[float]:
    """Check the settings of an ensemble and return its weights, scaled to sum to 1."""
    if not count:
        raise ConfigError("an ensemble needs at least one teacher")
    if combine not in get_args(Combine):
        raise ConfigError(f"combine={combine!r} is unknown{did_you_mean(str(combine), get_args(Combine))}")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ConfigError(f"weights has {len(weights)} numbers for {count} members: give one each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) == 0:
        raise ConfigError(f"weights={weights}: give numbers of at least 0, not all of them 0")
    return [weight / sum(weights) for weight in weights]


def _combined(answers: list[Tensor], shares: list[float], combine: Combine) -> Tensor:
    first = answers[0]
    for number, other in enumerate(answers):
        if other.shape != first.shape:
            raise ConfigError(
                f"teacher.checkpoint: the members do not fit together: member 0 answers for {first.shape[-1]} classes "
                f"(logits {tuple(first.shape)}), member {number} for {other.shape[-1]} (logits {tuple(other.shape)})"
            )
    logits = torch.stack(answers).float()
    weights: Tensor = logits.new_tensor(shares).view(-1, *[1] * first.ndim)
    if combine == "logits":
        return (weights * logits).sum(0)
    return (logits.log_softmax(-1) + weights.log()).logsumexp(0)
