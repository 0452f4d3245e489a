"""Named terms x weights -> one loss, and its parts by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.losses.cross_entropy import CrossEntropyLoss
from kd_lightning.losses.sparse import SparseKDLoss
from kd_lightning.losses.term import Scheduled, Term, at_least_float32
from kd_lightning.models.features import depth
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.training.loss_balancing import Balance, gradient_report, loss_shares, make_balance
from kd_lightning.types import Batch, ModelOutput

_log = logging.getLogger(__name__)


class Objective(nn.Module):
    r"""The weighted sum of a distillation's loss terms.

    .. math:: L = \sum_i w_i(p) \, L_i

    The reference method is `terms = {ce: CrossEntropyLoss(), kd: SoftTargetLoss(T)}` with
    `weights = {ce: 1 - alpha, kd: alpha}`, which is (1 - alpha) CE + alpha T^2 KL.

    Args:
        terms: Loss terms by name; the name is what each is logged under.
        weights: A weight for each term, a number >= 0 or a schedule over training progress p.
        balance: How the terms are brought to one scale before they are weighted: `fixed` (as they are),
            `unit_initial`, `gradnorm` or `uncertainty`; see `kd_lightning.training.loss_balancing`.

    Attributes:
        planned: Whether layers have been paired.
        connected: Whether the terms have built what they size by the networks.

    Raises:
        ConfigError: No terms, names that do not pair up, a weight that is negative or not finite, or an unknown policy.
    """

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, Scheduled], balance: str = "fixed") -> None:
        super().__init__()
        if not terms:
            raise ConfigError("objective.terms is empty: name at least one loss term")
        if set(terms) != set(weights):
            raise ConfigError(
                f"objective.weights has {sorted(weights)}, objective.terms has {sorted(terms)}: "
                "give each term its weight"
            )
        for name, weight in weights.items():
            values = [_at(weight, step / 100) for step in range(101)]
            if bad := [value for value in values if not math.isfinite(value)]:
                raise ConfigError(f"objective.weights.{name} must be a finite number, got {bad[0]:g}")
            if min(values) < 0:
                raise ConfigError(f"objective.weights.{name} must not be negative, got {min(values):g}")
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.balance = make_balance(balance, list(self.terms))
        self.planned = False
        self.connected = False
        self._comparable = True

    @property
    def uses_teacher(self) -> bool:
        """True when any term reads the teacher's output."""
        return any(term.uses_teacher for term in self._terms())

    @property
    def connects(self) -> bool:
        """True while terms have something to build that `connect` has not built yet."""
        return not self.connected and any(type(term).connect is not Term.connect for term in self._terms())

    @property
    def pauses(self) -> bool:
        """True when a term may sit out steps of the training, so that its parameters get no gradient in them."""
        return any(map(callable, self.weights.values()))

    @property
    def needs_student(self) -> tuple[str, ...]:
        """The student's features that the terms read; final after `plan`."""
        return tuple(dict.fromkeys(name for term in self._terms() for name in term.needs_student))

    @property
    def needs_teacher(self) -> tuple[str, ...]:
        """The teacher's features that the terms read; final after `plan`."""
        return tuple(dict.fromkeys(name for term in self._terms() for name in term.needs_teacher))

    def plan(self, student: nn.Module, teacher: nn.Module) -> None:
        """Pair layers, which determines the features that the terms need.

        Raises:
            ConfigError: A network without layers of a kind that is needed, or a layer map that does not fit.
        """
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            try:
                term.plan(partial(depth, student), partial(depth, teacher))
            except (ConfigError, ValueError) as error:
                raise ConfigError(f"distillation.terms.{name}: {error}") from None
        self.planned = True

    def connect(self, student: ModelOutput, teacher: ModelOutput, examples: int) -> None:
        """Build what the terms size by the networks, once; see `Term.connect`."""
        if not self.connected:
            for term in self._terms():
                term.connect(_widened(student), _widened(teacher), examples)
            self.connected = True

    def counts(self, batch: Batch) -> Tensor:
        """Return the counts of all terms' means over a batch, concatenated; see `Term.counts`."""
        return torch.cat([term.counts(batch) for term in self._terms()])

    def forward(
        self,
        student: ModelOutput,
        teacher: ModelOutput,
        batch: Batch,
        progress: float = 0.0,
        mean_counts: Tensor | None = None,
        apart: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and every term's unweighted value by name.

        With `mean_counts`, the average of `counts` over all batches of a step, the loss is such that its average over
        them has every term's mean over the step (all tokens, all labelled examples, ...), not the mean of the means.

        Computed in float32 whatever the networks' precision: under autocast a loss's products of matrices would be
        done in 16 bits.

        In training a term whose schedule has its weight at 0 now is not computed and has no part, so that a recipe in
        stages pays for one stage at a time (unless all weights are 0). A term whose weight is the number 0 is computed,
        to be watched.

        The parts have graphs of their own with `apart`. Without it, cross-entropy and `SparseKDLoss` are computed in
        one pass over the student's logits; where it leaves out its output layer, only their sum has a gradient.
        """
        student, teacher = _widened(student), _widened(teacher)
        weights = self._weights(progress)
        skipping = self.training and any(weights.values())
        with torch.autocast(student.logits.device.type, enabled=False):
            shares = {} if mean_counts is None else self._shares(batch, mean_counts)
            means = {} if apart else self._together(student, teacher, batch, weights, shares)
            for name, term in self.terms.items():
                assert isinstance(term, Term)
                term.progress = progress
                if name not in means and (weights[name] != 0 or not (skipping and callable(self.weights[name]))):
                    means[name] = term.parts(student, teacher, batch)
            parts = {name: part.sum() for name, part in means.items()}
            if mean_counts is None:
                return self.balance(parts, weights), parts
            return self.balance({name: (part * shares[name]).sum() for name, part in means.items()}, weights), parts

    def _together(
        self, student: ModelOutput, teacher: ModelOutput, batch: Batch, weights: Mapping[str, float],
        shares: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the means of cross-entropy and sparse divergence from one pass over the logits.

        There are none where they count different rows, or where each needs a gradient of its own.
        """
        names = {type(term): name for name, term in self.terms.items()}
        ce, kd = names.get(CrossEntropyLoss), names.get(SparseKDLoss)
        if ce is None or kd is None or type(self.balance) is not Balance:
            return {}
        labels, divergence = self.terms[ce], self.terms[kd]
        assert isinstance(labels, CrossEntropyLoss)
        assert isinstance(divergence, SparseKDLoss)
        own = [term.counts(batch) for term in (labels, divergence)]
        if labels.label_smoothing or not weights[ce] or not weights[kd] or not own[0] or not torch.equal(*own):
            return {}
        beside = float(shares[ce] / shares[kd]) if shares else 1.0  # another process may count other rows of labels
        found = divergence.with_labels(student, teacher, batch, weights[ce] * beside, weights[kd])
        return {name: part.view(1) for name, part in zip((ce, kd), found, strict=True)}

    def account(self, parts: Mapping[str, Tensor], progress: float) -> dict[str, Any]:
        """Return what to log of a step: each term's value and its share of the loss, and `settings`."""
        values = {name: part.detach() for name, part in parts.items()}
        shares = loss_shares(parts, self._effective(progress))
        return values | {f"share/{name}": share for name, share in shares.items()} | self.settings(progress)

    def gradients(self, parts: Mapping[str, Tensor], progress: float) -> dict[str, float]:
        """Compare the terms' gradients (see `balance.gradient_report`); where that cannot be, log why, once."""
        if not self._comparable:
            return {}
        try:
            report = gradient_report(parts, self._effective(progress))
        except RuntimeError as error:
            self._comparable = False
            _log.warning("The terms' gradients are not compared: %s", error)
            return {}
        return {f"gradient/{name}": value for name, value in report.items()}

    def settings(self, progress: float) -> dict[str, Any]:
        """Return the current weights, factors and scheduled values, for logging."""
        values: dict[str, Any] = {f"weight/{name}": weight for name, weight in self._weights(progress).items()}
        values |= {f"balance/{name}": factor.detach() for name, factor in self.balance.factors().items()}
        for name, term in zip(self.terms, self._terms(), strict=True):
            term.progress = progress
            values.update({f"{name}/{key}": value for key, value in term.settings().items()})
        return values

    def _shares(self, batch: Batch, mean_counts: Tensor) -> dict[str, Tensor]:
        """Return by term what makes its means over this batch its parts of the means over the step."""
        own = {name: term.counts(batch) for name, term in zip(self.terms, self._terms(), strict=True)}
        of_step = torch.split(mean_counts, [len(counts) for counts in own.values()])
        return {name: term.share(own[name], mean) for name, term, mean in zip(own, self._terms(), of_step, strict=True)}

    def _weights(self, progress: float) -> dict[str, float]:
        """Return the configured weights at this progress."""
        return {name: _at(weight, progress) for name, weight in self.weights.items()}

    def _effective(self, progress: float) -> dict[str, float | Tensor]:
        """Return what each term's gradient is multiplied by: its weight, and what `balance` makes of it."""
        factors = self.balance.factors()
        weights = self._weights(progress)
        return {name: weight * factors[name].detach() if factors else weight for name, weight in weights.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the networks, but keep the dtype if a trainer (`bf16-true`) reduces theirs."""

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y.to(x.dtype) if y.is_floating_point() and y.dtype.itemsize < x.dtype.itemsize else y

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def _terms(self) -> list[Term]:
        return list(self.terms.values())  # type: ignore[arg-type]


def _widened(output: ModelOutput) -> ModelOutput:
    """Return the output in float32 where it is narrower."""
    features = {name: at_least_float32(value) for name, value in output.features.items()}
    return replace(output, logits=at_least_float32(output.logits), features=features)


def _at(value: Scheduled, progress: float) -> float:
    return value(progress) if callable(value) else value
