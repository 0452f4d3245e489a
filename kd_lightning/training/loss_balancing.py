r"""Compares the gradients of loss terms, and balances them by policies.

"KD does not help" is most often a mistake of scale: one term's gradient is a hundred times the other's. The gradients
are compared on the *shared layer*: of the weight matrices that every term's graph reaches, the
one used last in the forward pass (so never a projector, which is one term's own). For terms on logits it is the
classifier, for a hint on layer 3 a matrix of layer 3. It is the layer W of GradNorm (Chen et al. 2018), and cheap: the
backward pass ends there.

With the configured weights :math:`w_i`, which a schedule may move, every policy minimises

.. math:: L = \sum_i w_i \, (f_i L_i + c_i)

with its own factors :math:`f_i`; the configured weights stay multipliers in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.term import at_least_float32
from kd_lightning.runtime.errors import ConfigError, did_you_mean

Parts = Mapping[str, Tensor]
"""The terms' unweighted values by name, with their graphs; one whose weight is 0 may be missing."""
Weights = Mapping[str, float | Tensor]


class Balance(nn.Module):
    """The policy `fixed`: f = 1, c = 0. The others change the factors.

    Args:
        names: The terms' names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)

    def forward(self, parts: Parts, weights: Weights) -> Tensor:
        """Return the loss."""
        if self.training:
            self.observe(parts, weights)
        factors = self.factors()
        loss = torch.zeros((), device=next(iter(parts.values())).device)
        for name, part in parts.items():
            loss = loss + weights[name] * (factors[name] * part if factors else part)
        return loss

    def observe(self, parts: Parts, weights: Weights) -> None:
        """Update the policy on a training batch, before its loss is computed."""

    def factors(self) -> dict[str, Tensor]:
        """Return f of the last loss by name; empty if all are 1."""
        return {}


class UnitInitial(Balance):
    """The policy `unit_initial`: every term starts at 1 times its weight, f = 1 / L(0) and c = 0.

    L(0) is the term's size on the first batch where it is not zero, averaged over DDP's ranks. It is a buffer, so a
    resumed training keeps it. At most 10,000-fold: a term that starts at zero (a student that begins as a copy
    of its teacher) has no scale to go by.
    """

    initial: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.register_buffer("initial", torch.zeros(len(self.names)))
        self._known: set[str] = set()  # avoids synchronising with a GPU in every step

    def observe(self, parts: Parts, weights: Weights) -> None:
        """Store the first values."""
        if parts.keys() - self._known:
            values = mean_over_ranks(self._sizes(parts).nan_to_num(0.0, 0.0, 0.0))
            self.initial.copy_(torch.where(self.initial > 0, self.initial, values))
            self._known = {name for name, value in zip(self.names, self.initial.tolist(), strict=True) if value > 0}

    def factors(self) -> dict[str, Tensor]:
        """Return 1 / L(0), and 1 for a term that has been zero so far."""
        scale = torch.where(self.initial > 0, self.initial.clamp(min=1e-4), 1.0)
        return dict(zip(self.names, (1 / scale).unbind(), strict=True))

    def _sizes(self, parts: Parts) -> Tensor:
        absent = self.initial.new_zeros(())
        return torch.stack([parts.get(name, absent).detach().abs().to(self.initial.dtype) for name in self.names])


class GradNorm(UnitInitial):
    r"""The policy `gradnorm` (Chen et al. 2018, arXiv 1711.02257): learned factors f = v.

    With :math:`G_i = v_i \|\nabla_W L_i\|` on the shared layer W, and the relative inverse training rate
    :math:`r_i = \tilde L_i / \mathrm{mean}_j \tilde L_j` of :math:`\tilde L_i = L_i / L_i(0)`, v descends

    .. math:: L_{grad} = \sum_i | G_i - \bar G \, r_i^{\alpha} |, \qquad \bar G = \mathrm{mean}_j G_j

    whose targets count as constant; then v is renormalised to its sum. :math:`\partial L_{grad} / \partial \log v_i` is
    :math:`\mathrm{sign}(G_i - \bar G r_i^{\alpha}) \, G_i`: no second derivative is needed.

    Differs from the paper in this. The step is taken on log v, so that no weight turns negative, and is divided by
    :math:`\bar G`, so that its length does not depend on the losses' units. Only every 10th batch measures the norms
    (a backward pass to W for each term). G is that of the term without its configured weight, which would else cancel
    out: where all terms train at one rate, gradients are as the weights are. Terms with weight 0, and those without a
    gradient on this batch, are skipped.

    v, L(0) and the number of batches so far are checkpointed. Under DDP norms and losses are averaged over the ranks.
    """

    ALPHA, RATE, EVERY = 1.5, 0.05, 10
    weight: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.register_buffer("weight", torch.ones(len(self.names)))
        self._batches = 0  # not a tensor: reading one from a GPU in every step would synchronise

    def observe(self, parts: Parts, weights: Weights) -> None:
        """Update v on the first batch and on every 10th after it."""
        super().observe(parts, weights)
        if torch.is_grad_enabled():
            if self._batches % self.EVERY == 0:
                self._update(parts, weights)
            self._batches += 1

    def factors(self) -> dict[str, Tensor]:
        """Return v."""
        return dict(zip(self.names, self.weight.clone().unbind(), strict=True))

    def get_extra_state(self) -> dict[str, int]:
        """Return what belongs in a checkpoint beside the buffers."""
        return {"batches": self._batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self._batches = state["batches"]

    def _update(self, parts: Parts, weights: Weights) -> None:
        active = active_terms(parts, weights)
        if len(active) < 2:
            return
        try:
            gradients = shared_gradients(active)
        except RuntimeError as error:
            raise ConfigError(f"balance=gradnorm: {error}; use fixed, unit_initial or uncertainty") from error
        norms = [gradients[name].norm() if name in active else self.weight.new_zeros(()) for name in self.names]
        sizes = torch.stack([torch.stack(norms).to(self.weight.dtype), self._sizes(parts)])
        norm, value = mean_over_ranks(sizes)
        counts = norm.isfinite() & (norm > 0) & value.isfinite() & (self.initial > 0)
        if counts.sum() > 1:
            at, initial = self.weight[counts], self.initial[counts]
            self.weight[counts] = gradnorm_step(at, norm[counts], value[counts] / initial, self.ALPHA, self.RATE)


class Uncertainty(Balance):
    r"""The policy `uncertainty` (Kendall, Gal & Cipolla 2018, arXiv 1705.07115): f = exp(-s), c = s / 2.

    :math:`s_i = \log \sigma_i^2` is learned with the student, by its optimizer and at its learning rate, without weight
    decay; it starts at 0 and is not part of the exported student. This is the paper's form for a classification,
    for every term; its form for a regression halves f, which moves s by log 2. At the optimum
    :math:`f_i = 1 / (2 L_i)`. A term that is zero or negative (VID's may be) has no optimum: its factor stops at
    `MOST`.
    """

    MOST = 1e4

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, parts: Parts, weights: Weights) -> Tensor:
        """Return the loss."""
        loss = super().forward(parts, weights)
        for name, log_variance in zip(self.names, self._log_variance.unbind(), strict=True):
            loss = loss + weights[name] * log_variance / 2
        return loss

    def factors(self) -> dict[str, Tensor]:
        """Return exp(-s)."""
        return dict(zip(self.names, torch.exp(-self._log_variance).unbind(), strict=True))

    @property
    def _log_variance(self) -> Tensor:
        return self.log_variance.clamp(min=-math.log(self.MOST))


POLICIES: dict[str, type[Balance]] = {
    "fixed": Balance,
    "unit_initial": UnitInitial,
    "gradnorm": GradNorm,
    "uncertainty": Uncertainty,
}


def make_balance(policy: str, names: Sequence[str]) -> Balance:
    """Build a policy by its name.

    Raises:
        ConfigError: There is no such policy.
    """
    if policy not in POLICIES:
        raise ConfigError(f"balance={policy!r}: unknown policy{did_you_mean(policy, POLICIES)}")
    return POLICIES[policy](names)


def gradnorm_step(weight: Tensor, norm: Tensor, progress: Tensor, alpha: float, rate: float) -> Tensor:
    r"""Return GradNorm's weights after one step; see `GradNorm`.

    Args:
        weight: v, `(n,)`, positive.
        norm: :math:`\|\nabla_W L_i\|`, `(n,)`, positive.
        progress: :math:`L_i / L_i(0)`, `(n,)`.
        alpha: How strongly slower terms are favoured; 0 makes all gradients equal.
        rate: Length of the step.

    Example:
        >>> v = gradnorm_step(torch.ones(2), torch.tensor([3.0, 1.0]), torch.ones(2), alpha=1.5, rate=0.1)
        >>> v, v.sum()  # the ratio falls by exp(-0.1 * (3 + 1) / 2)
        (tensor([0.9003, 1.0997]), tensor(2.))
    """
    size = weight * norm
    target = size.mean() * (progress / progress.mean().clamp(min=1e-12)) ** alpha
    moved = weight * torch.exp(-rate * torch.sign(size - target) * size / size.mean())
    return moved * (weight.sum() / moved.sum())


def loss_shares(parts: Parts, weights: Weights) -> dict[str, Tensor]:
    r"""Return shares :math:`|w_i L_i| / \sum_j |w_j L_j|` of the loss; zeros if all are, NaN if one is."""
    weighted = {name: (weights[name] * part.detach()).abs() for name, part in parts.items()}
    total = torch.stack(list(weighted.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: value / total for name, value in weighted.items()}


def gradient_report(parts: Parts, weights: Weights) -> dict[str, float]:
    r"""Compare the gradients :math:`g_i` of the terms on the shared layer.

    Parameters' gradients and random numbers are not touched, and DDP is not involved, so each rank uses its own batch.
    Terms with weight 0, or that do not reach the student, are left out.

    Returns:
        `norm/NAME`, of the unweighted :math:`\|g_i\|`; `share/NAME`, :math:`\|w_i g_i\| / \sum_j \|w_j g_j\|`;
        `cosine/A-B` for each pair, 0 where a gradient is zero. Empty for fewer than two terms.

    Raises:
        RuntimeError: The terms share no parameter, or the network's backward pass cannot run more than once.
    """
    active = active_terms(parts, weights)
    if len(active) < 2:
        return {}
    gradients = shared_gradients(active)
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    weighted = {name: float(weights[name]) * norm for name, norm in norms.items()}
    total = sum(weighted.values())
    values = {f"norm/{name}": norm for name, norm in norms.items()}
    values |= {f"share/{name}": value / total if total else 0.0 for name, value in weighted.items()}
    for (a, left), (b, right) in combinations(gradients.items(), 2):
        values[f"cosine/{a}-{b}"] = float(F.cosine_similarity(left, right, dim=0, eps=1e-30))
    return values


def active_terms(parts: Parts, weights: Weights) -> dict[str, Tensor]:
    """Return the terms with a weight that reach the student."""
    return {name: part for name, part in parts.items() if weights[name] > 0 and part.requires_grad}


def shared_gradients(parts: Parts) -> dict[str, Tensor]:
    """Return each term's flat gradient on the shared layer; keeps the graph for the backward pass.

    A compiled network is one node, whose graph claims to reach all its parameters. So if the last layer gets zeros
    from a term, all common layers are checked, and the last one with gradients from every term is used.

    Raises:
        RuntimeError: As for `gradient_report`.
    """
    layers = _common_layers(list(parts.values()))
    if not layers:
        raise RuntimeError(f"the terms {', '.join(parts)} reach no parameter in common")
    found = [_gradients(part, layers[:1]) for part in parts.values()]
    if len(layers) > 1 and not all(gradients[0].any() for gradients in found):
        found = [_gradients(part, layers) for part in parts.values()]
    moving = [gradients for gradients in found if any(gradient.any() for gradient in gradients)]
    last = next((i for i in range(len(found[0])) if all(gradients[i].any() for gradients in moving)), 0)
    return {name: gradients[last] for name, gradients in zip(parts, found, strict=True)}


def _gradients(part: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    scale = 2.0**10  # undone exactly; keeps float16's small gradients from vanishing, as a GradScaler does
    found = torch.autograd.grad(
        part, layers, grad_outputs=torch.full_like(part, scale), retain_graph=True, allow_unused=True
    )
    return [
        (torch.zeros_like(layer) if gradient is None else at_least_float32(gradient.to_dense()) / scale).flatten()
        for layer, gradient in zip(layers, found, strict=True)
    ]


def _common_layers(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the weight matrices that all graphs reach, last used first; without any, vectors."""
    reached = [_parameters_of(value) for value in values]
    uses = {leaf: min(found.get(leaf, -1) for found in reached) for leaf in reached[0]}
    common = [leaf for leaf, use in uses.items() if use >= 0]
    layers = [leaf for leaf in common if leaf.ndim >= 2] or common
    return sorted(layers, key=lambda leaf: uses[leaf])[::-1]  # among those of one operation, the last comes first


def _parameters_of(value: Tensor) -> dict[Tensor, int]:
    """Return the parameters that a graph reaches, with the number of the last operation using each."""
    found: dict[Tensor, int] = {}
    first: Any = value.grad_fn
    seen, waiting = {first}, [first]
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)
            if isinstance(leaf, nn.Parameter):
                found[leaf] = max(found.get(leaf, -1), node._sequence_nr())
            elif following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the average over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values
