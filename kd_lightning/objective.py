"""Named terms x weights -> one loss, and its parts by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from kd_lightning.errors import ConfigError
from kd_lightning.features import depth
from kd_lightning.losses.term import Scheduled, Term, at_least_float32
from kd_lightning.types import Batch, ModelOutput


class Objective(nn.Module):
    r"""The weighted sum of a distillation's loss terms.

    .. math:: L = \sum_i w_i(p) \, L_i

    The reference method is `terms = {ce: CrossEntropyLoss(), kd: SoftTargetLoss(T)}` with
    `weights = {ce: 1 - alpha, kd: alpha}`, which is (1 - alpha) CE + alpha T^2 KL.

    Args:
        terms: Loss terms by name; the name is what each is logged under.
        weights: A weight for each term, a number >= 0 or a schedule over training progress p.

    Attributes:
        connected: Whether the terms have built what they size by the networks.

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
        self.connected = False

    @property
    def uses_teacher(self) -> bool:
        """True when any term reads the teacher's output."""
        return any(term.uses_teacher for term in self._terms())

    @property
    def connects(self) -> bool:
        """True while terms have something to build that `connect` has not built yet."""
        return not self.connected and any(type(term).connect is not Term.connect for term in self._terms())

    @property
    def needs_student(self) -> tuple[str, ...]:
        """The student's features that the terms read; final after `plan`."""
        return tuple(dict.fromkeys(name for term in self._terms() for name in term.needs_student))

    @property
    def needs_teacher(self) -> tuple[str, ...]:
        """The teacher's features that the terms read; final after `plan`."""
        return tuple(dict.fromkeys(name for term in self._terms() for name in term.needs_teacher))

    def plan(self, student: nn.Module, teacher: nn.Module) -> None:
        """Settle which layers meet, and with that what the terms need of each network.

        Raises:
            ConfigError: A network without layers of a kind that is needed, or a layer map that does not fit.
        """
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            try:
                term.plan(partial(depth, student), partial(depth, teacher))
            except (ConfigError, ValueError) as error:
                raise ConfigError(f"distillation.terms.{name}: {error}") from None

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build what the terms size by the networks, once; see `Term.connect`."""
        if not self.connected:
            for term in self._terms():
                term.connect(_widened(student), _widened(teacher), examples)
            self.connected = True

    def forward(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and every term's unweighted value by name.

        Computed in float32 whatever the networks' precision: under autocast a loss's products of matrices would be
        done in 16 bits.
        """
        student, teacher = _widened(student), _widened(teacher)
        loss = torch.zeros((), device=student.logits.device)
        parts: dict[str, Tensor] = {}
        with torch.autocast(student.logits.device.type, enabled=False):
            for name, term in self.terms.items():
                assert isinstance(term, Term)
                term.progress = progress
                parts[name] = term(student, teacher, batch)
                loss = loss + _at(self.weights[name], progress) * parts[name]
        return loss, parts

    def settings(self, progress: float) -> dict[str, float]:
        """Return the weights and scheduled values in force at this progress: what to log beside the parts."""
        values = {f"weight/{name}": _at(weight, progress) for name, weight in self.weights.items()}
        for name, term in zip(self.terms, self._terms(), strict=True):
            term.progress = progress
            values.update({f"{name}/{key}": value for key, value in term.settings().items()})
        return values

    def _terms(self) -> list[Term]:
        return list(self.terms.values())  # type: ignore[arg-type]


def _widened(output: ModelOutput) -> ModelOutput:
    """Return the output in float32 where it is narrower."""
    features = {name: at_least_float32(value) for name, value in output.features.items()}
    return ModelOutput(at_least_float32(output.logits), features)


def _at(value: Scheduled, progress: float) -> float:
    return value(progress) if callable(value) else value
