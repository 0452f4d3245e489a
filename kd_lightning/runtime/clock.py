"""The time that a run is expected to take, and has taken."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Clock:
    """The time that a run is expected to take, and has taken.

    Attributes:
        parts: Expected seconds of each stage, by its path, and of the `report`.
        outputs: Those among them in which the teacher predicts for its students.
        begun: When the run began, in seconds of `time.monotonic`.
        memory: Expected bytes of each stage, by its path: weights, gradients, optimizer, what a step keeps for its
            gradients, and a teacher's weights. What torch and the data take besides is not counted.
    """

    parts: dict[str, float]
    outputs: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    memory: dict[str, int] = field(default_factory=dict)
    _done: float = 0.0

    @property
    def total(self) -> float:
        """Expected seconds of the whole run."""
        return sum(self.parts.values())

    @property
    def passed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.begun

    def left(self, part: str) -> float:
        """Return the expected seconds after a part is finished, at the pace of what is done."""
        self._done += self.parts.get(part, 0.0)
        pace = self.passed / self._done if self._done else 1.0
        return (self.total - self._done) * pace


def duration(seconds: float) -> str:
    """Return a time in words of one unit.

    >>> duration(42), duration(150), duration(9000)
    ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
