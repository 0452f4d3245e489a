"""Values that change over training: temperature, alpha, weights.

A schedule is any callable from training progress (0 at the first step, 1 at the last) to a float. Progress is the
trainer's step count over its planned steps, so a resumed run goes on where it was.

>>> import kd_lightning as kd
>>> kd.losses.SoftTargetLoss(temperature=kd.schedules.Linear(start=8.0, end=2.0))
SoftTargetLoss()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kd_lightning.runtime.errors import ConfigError


class Linear:
    r"""A straight line from `start` to `end`, reached at `until` and kept.

    .. math:: start + (end - start) \min(p / until, 1)

    >>> Linear(start=4.0, end=1.0, until=0.5)(0.25)
    2.5
    """

    def __init__(self, start: float, end: float, until: float = 1.0) -> None:
        self.start, self.end, self.until = start, end, _fraction(until, "until")

    def __call__(self, progress: float) -> float:
        """Return the value at this progress."""
        return self.start + (self.end - self.start) * min(progress / self.until, 1.0)


class Cosine:
    r"""Half a cosine wave from `start` to `end`, reached at `until` and kept.

    .. math:: end + (start - end) (1 + \cos(\pi \min(p / until, 1))) / 2

    >>> round(Cosine(start=1.0, end=0.0)(0.5), 6)
    0.5
    """

    def __init__(self, start: float, end: float, until: float = 1.0) -> None:
        self.start, self.end, self.until = start, end, _fraction(until, "until")

    def __call__(self, progress: float) -> float:
        """Return the value at this progress."""
        wave = (1.0 + math.cos(math.pi * min(progress / self.until, 1.0))) / 2.0
        return self.end + (self.start - self.end) * wave


class Step:
    """`values[i]` from the i-th boundary on; `values[0]` before the first.

    >>> s = Step(values=[8.0, 4.0, 1.0], boundaries=[0.5, 0.9])
    >>> s(0.0), s(0.5), s(0.95)
    (8.0, 4.0, 1.0)
    """

    def __init__(self, values: Sequence[float], boundaries: Sequence[float]) -> None:
        if len(values) != len(boundaries) + 1:
            raise ConfigError(
                f"Step: {len(values)} values and {len(boundaries)} boundaries given; n boundaries part n + 1 values"
            )
        if list(boundaries) != sorted(boundaries) or any(not 0.0 < b < 1.0 for b in boundaries):
            raise ConfigError(f"Step: boundaries must rise inside (0, 1), got {list(boundaries)}")
        self.values, self.boundaries = list(values), list(boundaries)

    def __call__(self, progress: float) -> float:
        """Return the value at this progress."""
        return self.values[sum(progress >= boundary for boundary in self.boundaries)]


class OneMinus:
    """`1 - value(progress)`: the weight that a scheduled alpha leaves to the labels.

    >>> OneMinus(Linear(start=0.0, end=1.0))(0.25)
    0.75
    """

    def __init__(self, value: Linear | Cosine | Step) -> None:
        self.value = value

    def __call__(self, progress: float) -> float:
        """Return the value at this progress."""
        return 1.0 - self.value(progress)


class Times:
    """`factor * value(progress)`: a term's scheduled weight times its task's weight.

    >>> Times(0.5, Linear(start=0.0, end=1.0))(0.5)
    0.25
    """

    def __init__(self, factor: float, value: Callable[[float], float]) -> None:
        if callable(factor):
            raise ConfigError("Times: its factor is a schedule; expected a number (an alpha that is one, for example)")
        self.factor, self.value = factor, value

    def __call__(self, progress: float) -> float:
        """Return the value at this progress."""
        return self.factor * self.value(progress)


def _fraction(value: float, name: str) -> float:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"a schedule's {name} is a share of the training in (0, 1], got {value}")
    return value
