"""What the points of a sweep, or the seeds of a run, have in common: made once a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_LAST: dict[str, tuple[Any, Any]] = {}


def shared(kind: str, key: object, make: Callable[[], T]) -> T:
    """Return what `make` made for this key, if it was the last thing of its kind that was asked for; else make it.

    One of a kind is kept, so that a sweep over data sets does not end with all of them in memory.

    >>> shared("example", 1, lambda: [1]) is shared("example", 1, lambda: [2])
    True
    >>> shared("example", 2, lambda: [2])
    [2]
    """
    if kind not in _LAST or _LAST[kind][0] != key:
        _LAST.pop(kind, None)  # before the next one is made: both need not fit
        _LAST[kind] = (key, make())
    found: T = _LAST[kind][1]
    return found
