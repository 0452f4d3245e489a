"""Named terms x weights -> one loss, and its parts by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_lightning.errors import ConfigError
from kd_lightning.losses.term import Scheduled, Term
from kd_lightning.types import Batch, ModelOutput


class Objective(nn.Module):
    r"""The weighted sum of a distillation's loss terms.

    .. math:: L = \sum_i w_i(p) \, L_i

    The reference method is `terms = {ce: CrossEntropyLoss(), kd: SoftTargetLoss(T)}` with
    `weights = {ce: 1 - alpha, kd: alpha}`, which is (1 - alpha) CE + alpha T^2 KL.

    Args:
        terms: Loss terms by name; the name is what each is logged under.
        weights: A weight for each term, a number >= 0 or a schedule over training progress p.

    Raises:
        ConfigError: No terms, names that do not pair up, or a negative weight.
    """

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, Scheduled]) -> None:
        super().__init__()
        if not terms:
            raise ConfigError("objective.terms is empty: name at least one loss term")
        if set(terms) != set(weights):
            raise ConfigError(
                f"objective.weights has {sorted(weights)}, objective.terms has {sorted(terms)}: "
                "give each term its weight"
            )
        for name, weight in weights.items():
            if not callable(weight) and weight < 0:
                raise ConfigError(f"objective.weights.{name} must not be negative, got {weight}")
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)

    @property
    def uses_teacher(self) -> bool:
        """True when any term reads the teacher's output."""
        return any(bool(term.uses_teacher) for term in self.terms.values())

    def forward(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and every term's unweighted value by name (detached)."""
        loss = torch.zeros((), device=student.logits.device)
        parts: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            term.progress = progress
            value = term(student, teacher, batch)
            loss = loss + _at(self.weights[name], progress) * value
            parts[name] = value.detach()
        return loss, parts

    def settings(self, progress: float) -> dict[str, float]:
        """Return the weights and scheduled values in force at this progress: what to log beside the parts."""
        values = {f"weight/{name}": _at(weight, progress) for name, weight in self.weights.items()}
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            term.progress = progress
            values.update({f"{name}/{key}": value for key, value in term.settings().items()})
        return values


def _at(value: Scheduled, progress: float) -> float:
    return value(progress) if callable(value) else value
