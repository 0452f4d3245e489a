"""A task's scores, accumulated batch by batch: of a split only sums are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch, SparseLogits

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class ScoreSpec:
    """How a score is to be read: what report, exports and commands know of it.

    Attributes:
        title: What people call it, with its unit if it has one.
        mode: Whether more or less of it is better.
        share: It is a share of examples that are right, whose error over n of them is sqrt(p (1 - p) / n).
        shown: In tables `always`; `alone`, where there is one task; `apart`, among the standard errors; or `never`, in
            files only.
        exp_of: The score to whose power it is e, if it is; its standard error follows from that.
        across: Whether it compares models that read other tokens.
    """

    title: str
    mode: Mode = "max"
    share: bool = False
    shown: Literal["always", "alone", "apart", "never"] = "alone"
    exp_of: str | None = None
    across: bool = True


class Values(NamedTuple):
    """What scores are means of.

    Attributes:
        units: `(N,)` int64, which example or document each value is of: these are drawn independently, values are not.
        of: By score, values `(N,)` and their weights `(N,)`. The score is the sum of values over that of weights.
    """

    units: Tensor
    of: dict[str, tuple[Tensor, Tensor]]


class UnitSums(NamedTuple):
    """A score's values and weights, summed by unit: `(U,)` float64, by the units' numbers."""

    totals: NDArray[np.float64]
    weights: NDArray[np.float64]


class ByUnit:
    """Sums of values by unit, whatever the batches.

    >>> sums = ByUnit()
    >>> sums.add(Values(torch.tensor([7, 7, 3]), {"right": (torch.tensor([1.0, 0.0, 1.0]), torch.ones(3))}))
    >>> sums.sums()["right"]
    UnitSums(totals=array([1., 1.]), weights=array([1., 2.]))
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, values: Values | None) -> None:
        """Add a batch's values, if it has any."""
        if values is not None:
            self._names = list(values.of)
            columns = torch.stack([column.float() for pair in values.of.values() for column in pair], -1)
            self._parts.append(_by_unit(values.units.cpu(), columns.cpu().double()))

    def sums(self) -> dict[str, UnitSums]:
        """Return the sums by score; empty where nothing was added."""
        if not self._parts:
            return {}
        units, parts = zip(*self._parts, strict=True)
        columns = _by_unit(torch.cat(units), torch.cat(parts))[1].numpy().T
        return {name: UnitSums(*columns[2 * i : 2 * i + 2]) for i, name in enumerate(self._names)}


def _by_unit(units: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    found, place = torch.unique(units, return_inverse=True)
    return found, columns.new_zeros(len(found), columns.shape[1]).index_add(0, place, columns)


class Scores(nn.Module):
    """Scores of what a model outputs, against labels or against a teacher's logits.

    Args:
        metrics: By name; their states are sums.

    Attributes:
        divides: Whether the `states` of a split's parts add up to its own; otherwise all is scored together.

    >>> from kd_lightning.tasks.metrics import Accuracy
    >>> scores = Scores({"accuracy": Accuracy(2)})
    >>> scores.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), {})
    >>> scores.compute()
    {'accuracy': tensor(0.5000)}
    """

    divides: bool = True

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(metrics)

    @property
    def names(self) -> list[str]:
        """Of the scores."""
        return list(self.metrics)

    def alone(self) -> Self:
        """Keep to what this process adds: otherwise metrics add up what all processes of a training have."""
        for metric in self._all():
            metric.distributed_available_fn = _never
        return self

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> Values | None:
        """Add a batch.

        Args:
            logits: `(B, C)` or `(B, L, C)`; a task may take these in sparse form, too.
            against: Labels `(B,)` or `(B, L)`, or a teacher's logits; a task may take these in sparse form, too.
            rows: The batch as `Task.compared` returns it.

        Returns:
            The values that scores are means of, for those scores that are; None where none is.
        """
        if isinstance(against, SparseLogits):
            raise ConfigError("these scores compare all logits with the teacher's: leave out teacher.cache_top_k")
        if "keep" in rows:
            logits, against = logits[rows["keep"]], against[rows["keep"]]
        if len(logits):
            for metric in self.metrics.values():
                metric.update(logits, against)  # type: ignore[operator]
        return None

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes."""
        return {name: metric.compute() for name, metric in self.metrics.items()}  # type: ignore[operator]

    def values(self) -> Values | None:
        """Return the values that scores are means of, if they are known only after `compute`."""
        return None

    def reset(self) -> None:
        """Forget what was added."""
        for metric in self._all():
            metric.reset()

    def states(self) -> Tensor:
        """Return the sums as a float64 vector `(K,)`; those of subsets add up to the split's."""
        return torch.cat([state.reshape(-1).double().cpu() for _, _, state in self._states()])

    def load(self, states: Tensor) -> None:
        """Take numbers that `states` returned, or a sum of such, for what was added."""
        sizes = [state.numel() for _, _, state in self._states()]
        for (metric, name, state), values in zip(self._states(), torch.split(states, sizes), strict=True):
            setattr(metric, name, values.view(state.shape).to(state.device, state.dtype))
            metric._update_count, metric._computed = 1, None  # else it warns, or returns what it was before

    def _all(self) -> Iterator[Metric]:
        return (module for module in self.modules() if isinstance(module, Metric))

    def _states(self) -> list[tuple[Metric, str, Tensor]]:
        found = [(metric, name, getattr(metric, name)) for metric in self._all() for name in metric._defaults]
        found = [(metric, name, state) for metric, name, state in found if isinstance(state, Tensor) or state]
        if odd := [type(metric).__name__ for metric, name, _ in found if metric._reductions[name] is not dim_zero_sum]:
            raise TypeError(f"{', '.join(odd)} keeps states that are no sums: scores of a split's parts do not add up")
        return found


def _never() -> bool:
    return False
