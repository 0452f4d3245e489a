"""Files that are never half written."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, to be written; afterwards it takes `path`'s place in one step.

    Whatever goes wrong (a full disk, Ctrl-C), `path` stays as it was and nothing half-written stays beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: it is the old one or the new one, and on disk when this returns."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


class Busy(Exception):
    """Another process holds a lock; its text says which."""


@contextmanager
def alone(lock: Path, say: Callable[[str], None], wait: bool = True) -> Iterator[None]:
    """Hold a lock, which the system releases when its holder dies. A process that holds it may take it again.

    Args:
        lock: Its file, which stays.
        say: Told, once, whom this process waits for.
        wait: Whether to wait at all.

    Raises:
        Busy: Another process has it and `wait` is False.
        OSError: The lock cannot be made.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))  # where nothing can be made, filelock waits
    held = filelock.FileLock(lock, thread_local=False, is_singleton=True)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        holder = ""
        with suppress(OSError):  # who it is helps, but is not needed
            holder = lock.read_text(encoding="utf-8").strip()
        if not wait:
            raise Busy(holder or "another process") from None
        say(f"waiting for {holder or 'another process'}")
        held.acquire()
    try:
        with suppress(OSError):  # a full disk
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        held.release()
