"""What the benchmarks share: one measure, turns taken by what is compared, and fresh processes for memory."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kd_lightning.runtime.memory import peak_bytes

LIMIT = 12 * 3600
"""Seconds that a process of a benchmark may take; the peers train for hours."""


@dataclass
class Measure:
    """One figure of a benchmark.

    Attributes:
        name: What was measured, readable in a table.
        values: One a round.
        unit: `ratio`, `s`, `MB`, ...
        goal: `<= 1.03`, `>= 0.9`, or None where the figure is only reported. It is held against the median.
        note: What a reader must know to judge it.
    """

    name: str
    values: list[float]
    unit: str
    goal: str | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as it is written to the results."""
        median = statistics.median(self.values)
        return {
            "name": self.name, "unit": self.unit, "median": median, "low": min(self.values), "high": max(self.values),
            "rounds": len(self.values), "goal": self.goal, "met": self.met(median), "note": self.note,
        }  # fmt: skip

    def met(self, median: float) -> bool | None:
        """Return whether the goal is met, None without one."""
        if self.goal is None:
            return None
        sign, bound = self.goal.split()
        return median <= float(bound) if sign in ("<=", "<") else median >= float(bound)


def interleave(work: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Time several pieces of work in turn, so that a machine that slows down slows all of them.

    Each is run once untimed; then come the rounds, each beginning with another one.

    Returns:
        Seconds of every round, under the names of the work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for do in work.values():
        do()
    names = list(work)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            work[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(top: list[float], bottom: list[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(top, bottom, strict=True)]


def peak_rss_mb() -> float:
    """Return the most memory this process has held so far, in MB."""
    return peak_bytes() / 1e6


def fresh_process(function: str, **arguments: Any) -> dict[str, Any]:
    """Call a function in a process of its own.

    Args:
        function: `module:name`, e.g. `benchmarks.vocabulary:naive`; returns a dictionary of plain values.
        arguments: Plain values.

    Returns:
        What it returned, with `peak_rss_mb` and, before the call but after its module's imports, `import_rss_mb`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, json.dumps(arguments)))
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT):  # true also where it has died
            process.kill()
            raise TimeoutError(f"{function} has not returned after {LIMIT} s")
        done: dict[str, Any] = ours.recv()
    except EOFError:
        process.join(60)
        raise RuntimeError(f"{function} ended with exit code {process.exitcode} (-9: out of memory?)") from None
    process.join(60)
    return done


def _call(pipe: Any, function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    do = getattr(importlib.import_module(module), name)
    before = peak_rss_mb()
    done = do(**json.loads(arguments))
    pipe.send({**(done or {}), "peak_rss_mb": peak_rss_mb(), "import_rss_mb": before})
    pipe.close()
