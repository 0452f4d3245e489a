"""What happens in a command, counted: each file opened, renamed, removed or made below a folder, each optimizer step.

A kill is placed by such a count, never by the clock, so that it comes at the same place on every machine.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

AUDITED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
WAYS = ("SIGKILL", "torn", "SIGTERM", "SIGINT")
"""A signal, or `torn`: the process dies in the middle of its next write to a file, which stays half written."""


def counting(root: Path, note: Path) -> Callable[[], None]:
    """Return what a fork calls so that its events are written down, a line each, when it ends."""

    def begin() -> None:
        events: list[str] = []
        _watch(root, lambda _, what: events.append(what))
        atexit.register(lambda: note.write_text("".join(f"{event}\n" for event in events), encoding="utf-8"))

    return begin


def ending(root: Path, note: Path, at: int, way: str, size: int) -> Callable[[], None]:
    """Return what a fork calls so that it dies at its event `at`, having written down which that was.

    Args:
        root: Below which files count.
        note: Where it is written down.
        at: From 1.
        way: One of `WAYS`.
        size: How long the file is when a torn write ends.
    """

    def begin() -> None:
        file = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # here: a thread that writes cannot set it

        def act(number: int, what: str) -> None:
            if number != at:
                return
            os.write(file, what.encode("utf-8", errors="replace"))
            if way == "torn":
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            else:
                os.kill(os.getpid(), signal.Signals[way])

        _watch(root, act)

    return begin


def _watch(root: Path, act: Callable[[int, str], None]) -> None:
    """Count from now on, and tell `act` of each event its number and what it is."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    count, below, here, own = [0], f"{root}{os.sep}", os.getcwd(), os.getpid()

    def happens(what: str) -> None:
        if os.getpid() != own:  # a process that measures memory
            return
        count[0] += 1
        act(count[0], what)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in AUDITED or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.join(here, os.fsdecode(arguments[0]))
        if path.startswith(below):
            mode = f" {arguments[1]}" if event == "open" else ""
            happens(f"{event}{mode} {path.removeprefix(below)}")

    sys.addaudithook(audit)
    register_optimizer_step_pre_hook(lambda *_: happens("step"))
