"""Objects shared by the points of a sweep or the seeds of a run, created once per process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_KEPT: dict[str, list[tuple[object, Any]]] = {}
_MOST = 4


def shared(kind: str, key: object, make: Callable[[], T]) -> T:
    """Return the cached result of `make` for this key, or call it; keeps the last four of a kind.

    >>> shared("example", 1, lambda: [1]) is shared("example", 1, lambda: [2])
    True
    >>> shared("example", 2, lambda: [2])
    [2]
    """
    kept = _KEPT.setdefault(kind, [])
    found: T
    for known, found in kept:
        if known == key:
            return found
    del kept[: max(len(kept) - _MOST + 1, 0)]  # before `make`, so that memory need not hold both
    found = make()
    kept.append((key, found))
    return found


def stamps(settings: Any) -> list[tuple[str, int, int]]:
    """Return size and time of every file that settings name, and of those in folders that they name.

    Part of a key: a long-lived process must not reuse results for changed files.
    """
    files = [file for path in _paths(settings) for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _paths(settings: Any) -> Iterator[Path]:
    if isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _paths(value)
    elif isinstance(settings, str) and len(settings) < 4096 and Path(settings).exists():
        yield Path(settings)
