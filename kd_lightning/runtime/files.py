"""Atomic writes, temporary files and locks."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from kd_lightning.runtime.borders import visible
from kd_lightning.runtime.errors import ConfigError, KDError, environment_fault, nameless_disk_fault

_TEMPORARY = re.compile(r"\..+\.(\d+)@(.+)\.tmp")
_OF_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")
_LONG_AGO = 86_400.0
"""Seconds after which a temporary file of another machine counts as abandoned."""
WATCHED = 1.0
"""Seconds within which those who look whether a lock is held have let go of it."""
_numbers = itertools.count()


def temporary_name(name: str) -> str:
    """Return this process's temporary name for `name`, which `remove_temporary` recognises."""
    return f".{name}.{next(_numbers)}.{os.getpid()}@{socket.gethostname()}.tmp"


def remove_temporary(folder: Path, alone: bool = False) -> None:
    """Remove partial files and folders of killed processes from a folder.

    Args:
        folder: Where to look, without its subfolders.
        alone: Whether no other process writes there, as for the holder of its lock. Otherwise files of living
            processes of this machine stay, and those of other machines for a day.
    """
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (alone or not _may_be_written(path, int(match[1]), match[2])):
            with suppress(FileNotFoundError):  # another process of this command was faster
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in half_saved(folder) if alone else ():
        path.unlink(missing_ok=True)


def half_saved(folder: Path) -> list[Path]:
    """Return partial files of killed safetensors writers; the caller holds the lock."""
    return [path for path in folder.glob(".tmp??????") if _OF_SAFETENSORS.fullmatch(path.name) and path.is_file()]


def _may_be_written(path: Path, process: int, host: str) -> bool:
    if host != socket.gethostname():
        with suppress(FileNotFoundError):
            return time.time() - path.lstat().st_mtime < _LONG_AGO
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is alive and another user's
        return True
    return True


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Create a temporary folder, to be moved to its destination, and remove it at the end.

    First removes temporary folders of killed processes in `parent`.

    Raises:
        OSError: It cannot be created.
    """
    remove_temporary(parent)
    folder = parent / temporary_name(name)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` in one step at the end.

    After an error (a full disk, Ctrl-C), `path` is unchanged and no partial file is left. The mode is that of a new
    file under the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with naming(path):
            mode = _mode_of_new(temporary)
            yield temporary
            if not temporary.is_symlink() and stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to errors of a full disk and the like while it is written."""
    try:
        yield
    except Exception as error:
        if number := nameless_disk_fault(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _mode_of_new(path: Path) -> int:
    """Return the mode of a new file."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step, and sync it to disk."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def check_place(folder: Path, given: str) -> None:
    """Refuse, before any work, a folder (existing or not) into which no file can be written.

    Args:
        folder: The folder; nothing is left in it.
        given: The user's argument, for the message: `--out x`.

    Raises:
        ConfigError: With the reason from `environment_fault`.
        KDError: The disk is full, or fails.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if _is_there(place))
        if max(len(os.fsencode(part)) for part in folder.absolute().parts) > os.pathconf(there, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))  # fails on a full disk
    except OSError as error:
        plain = OSError(error.errno, error.strerror)  # without the path, which `given` names
        reason = environment_fault(plain) or error.strerror or type(error).__name__
        kind = KDError if nameless_disk_fault(plain) else ConfigError
        raise kind(f"{given}: nothing can be written there ({reason})") from error


def _is_there(place: Path) -> bool:
    """Return whether a path exists; unlike `os.path.lexists`, raise for an invalid path."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class Busy(Exception):
    """Another process holds a lock; its text names it."""


def holder(lock: Path) -> str | None:
    """Return who holds a lock, such as `process 12 on machine`, without writing or waiting; None: nobody.

    A lock that cannot be looked at, such as another user's or a pipe of its name, counts as held by `unknown`, with
    the reason.
    """
    try:
        with _opened(lock) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _named_in(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"unknown ({lock.name}: {error.strerror})"
    return None


@contextmanager
def _opened(lock: Path) -> Iterator[int]:
    """Open a lock's file for reading; neither a link is followed nor a pipe's writer waited for."""
    descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(lock))
        yield descriptor
    finally:
        os.close(descriptor)


def _named_in(descriptor: int) -> str:
    """Return the holder that a lock's file names, as one line to print."""
    lines = os.pread(descriptor, 200, 0).decode(errors="replace").splitlines()
    return visible(lines[0]).strip() if lines and lines[0].strip() else "another process"


@contextmanager
def alone(lock: Path, say: Callable[[str], None], wait: bool = True) -> Iterator[None]:
    """Hold a lock, which the system releases when its holder dies; reentrant within a process.

    Args:
        lock: Its file, which is not removed.
        say: Receives a line with the process that this one waits for.
        wait: Whether to wait longer than for those who look whether it is held, as `holder` does.

    Raises:
        Busy: Another process has it and `wait` is False.
        OSError: The lock cannot be created.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644))  # or filelock would wait
    held = filelock.FileLock(lock, thread_local=False, is_singleton=True)
    try:
        held.acquire(timeout=WATCHED)
    except filelock.Timeout:
        name = "another process"
        with suppress(OSError), _opened(lock) as descriptor:  # the holder's name is optional
            name = _named_in(descriptor)
        if not wait:
            raise Busy(name) from None
        say(f"waiting for {name}")
        held.acquire()  # without a limit: the holder may train for days, and the system releases a dead one's lock
    try:
        with suppress(OSError):  # a full disk
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        held.release()
