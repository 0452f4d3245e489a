"""Waiting, with a limit and an eye on the process that is to bring about what is waited for."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TypeVar

T = TypeVar("T")
Process = subprocess.Popen[bytes] | subprocess.Popen[str] | BaseProcess


def exit_code(process: Process) -> int | None:
    """Return how a process ended, negative for the signal that killed it; None while it runs."""
    return process.exitcode if isinstance(process, BaseProcess) else process.poll()


def wait_for(condition: Callable[[], T], what: str, process: Process | None = None, timeout: float = 60) -> T:
    """Ask until the answer is true, and return it.

    Args:
        condition: Asked a hundred times a second.
        what: It says, for whoever reads that it did not happen.
        process: Who brings it about; nothing is waited for once it has ended.
        timeout: In seconds.

    Raises:
        TimeoutError: It did not come in time, or the process ended without it.
    """
    end = time.monotonic() + timeout
    while True:
        ended = None if process is None else exit_code(process)  # asked first: it may do it and end in between
        if found := condition():
            return found
        if ended is not None:
            raise TimeoutError(f"waited for {what}, and its process ended with exit code {ended} before it came")
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.01)


def end_of(process: Process, timeout: float = 120) -> int:
    """Wait for the end of a process, which is killed where it does not come; returns the exit code.

    Raises:
        TimeoutError: It did not end in time.
    """
    try:
        wait_for(lambda: exit_code(process) is not None, f"the end of process {process.pid}", timeout=timeout)
    except TimeoutError:
        process.kill()
        raise
    code = exit_code(process)
    assert code is not None
    return code
