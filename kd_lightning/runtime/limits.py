"""Calls of libraries that wait for a network by rules of their own."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from threading import Thread

PATIENCE = 300.0
"""Seconds that a logger may take to send what it has, while a lock is held."""


def within(seconds: float, call: Callable[[], object]) -> None:
    """Call something and wait for it so long; later it is left to itself, and ends with the process.

    Raises:
        TimeoutError: It has not returned. What it raises in time is raised here.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not done after {seconds:g} s: it is not waited for")
    if failed:
        raise failed[0]
