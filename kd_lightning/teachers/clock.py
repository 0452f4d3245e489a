"""How long teachers have predicted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MOST = 512
"""So many calls are measured by a GPU before their times are added up."""


class Clock:
    """Adds up the time that networks compute.

    A GPU computes after the call has returned. Its own events measure it, and only who reads `seconds` waits for them.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measure what a block computes on a device."""
        if device.type != "cuda":
            begun = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - begun
            return
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        yield
        end.record(stream)
        self._running.append((begin, end))
        if len(self._running) >= _MOST:
            self._add(len(self._running) // 2)  # these have ended long ago

    @property
    def seconds(self) -> float:
        """All of it so far, in this process."""
        self._add(len(self._running))
        return self._seconds

    def _add(self, count: int) -> None:
        for begin, end in self._running[:count]:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        del self._running[:count]


PREDICTING = Clock()
"""Of every teacher that runs in this process, whoever calls it."""
