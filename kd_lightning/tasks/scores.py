"""A task's scores, accumulated batch by batch: nothing of a split is kept but sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
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
        shown: In tables `always`; `alone`, where there is one task; or `never`, in files only.
    """

    title: str
    mode: Mode = "max"
    share: bool = False
    shown: Literal["always", "alone", "never"] = "alone"


class Scores(nn.Module):
    """Scores of what a model outputs, against labels or against a teacher's logits.

    Args:
        metrics: By name; their states are sums.

    >>> from kd_lightning.tasks.metrics import Accuracy
    >>> scores = Scores({"accuracy": Accuracy(2)})
    >>> scores.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), {})
    >>> scores.compute()
    {'accuracy': tensor(0.5000)}
    """

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

    def update(self, logits: Tensor, against: Tensor, rows: Batch) -> None:
        """Add a batch.

        Args:
            logits: `(B, C)` or `(B, L, C)`.
            against: Labels `(B,)` or `(B, L)`, or a teacher's logits; a task may take these in sparse form, too.
            rows: The batch as `Task.compared` returns it.
        """
        if isinstance(against, SparseLogits):
            raise ConfigError("these scores compare all logits with the teacher's: leave out teacher.cache_top_k")
        if "keep" in rows:
            logits, against = logits[rows["keep"]], against[rows["keep"]]
        if len(logits):
            for metric in self.metrics.values():
                metric.update(logits, against)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return the scores of all that was added, in all processes."""
        return {name: metric.compute() for name, metric in self.metrics.items()}  # type: ignore[operator]

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
