"""Errors a user can act on; a command prints one line, and its exit code depends on the class."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class KDError(Exception):
    """A failure that the user can act on: with what was given, what was expected and what to change.

    >>> import kd_lightning as kd
    >>> try:
    ...     kd.Objective(terms={}, weights={})
    ... except kd.KDError as error:
    ...     print(error)
    objective.terms is empty: name at least one loss term
    """

    def __str__(self) -> str:
        """Return the message with control characters escaped."""
        from kd_lightning.runtime.borders import visible

        return visible(super().__str__(), keep="\n\t")


class Interrupted(KDError):
    """A training that was stopped and can be resumed."""


class Diverged(KDError):
    """A training whose loss, gradient or validation score is NaN or infinite."""


class ConfigError(KDError):
    """A configuration key that is unknown, of the wrong type or value, or in conflict with another."""


class DataError(KDError):
    """A data file or data set that cannot be used; names the file, line and column."""


class CacheError(KDError):
    """A cached teacher output that is missing, damaged or of another teacher or data set."""


_FULL = "make room there and run the same command again, or choose another disk"
_CLOSED = "choose a folder that can be written, or change its mode"
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "allow larger files (ulimit -f), or choose another disk",
    errno.EROFS: _CLOSED,
    errno.EIO: "the disk or its network fails: choose another one",
}
"""Disk faults and what to do; later errors of libraries are consequences of these."""
_ENVIRONMENT = _DISK | {
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of that path is a file: choose another one",
    errno.EEXIST: "something of that name exists: choose another one, or move it",
    errno.EISDIR: "that is a folder, not a file: choose another path",
    errno.ENOTEMPTY: "choose a new folder",
    errno.ENOENT: "it does not exist, cannot be created, or was removed meanwhile",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENXIO: "that is a pipe or a device, not a file: remove it, or choose another path",
    errno.ELOOP: "its links lead in a circle",
}
"""Faults outside of the program."""


def environment_fault(error: BaseException) -> str | None:
    """Return one line on a fault outside of the program, such as a full disk; None for other errors."""
    number, path = _system_error(error)
    advice = _ENVIRONMENT.get(number)
    behind = error
    while advice is None and (following := behind.__cause__ or behind.__context__) is not None:
        behind = following
        number, path = _system_error(behind)
        advice = _DISK.get(number)
    if advice is None:
        return None
    shown = path if len(path) <= 120 else f"{path[:60]}...{path[-50:]}"
    return f"{shown}{': ' if shown else ''}{os.strerror(number)}; {advice}"


def nameless_disk_fault(error: BaseException) -> int:
    """Return the errno of a disk fault whose error names no path, as in libraries; else 0."""
    number, path = _system_error(error)
    return number if number in _DISK and not path else 0


def _system_error(error: BaseException) -> tuple[int, str]:
    """Return the errno of an error, 0 for none, and its path."""
    if isinstance(error, OSError) and error.errno:
        return error.errno, os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of a library in Rust, such as safetensors
        return int(found[1]), ""
    if re.search(r"\d+ requested and \d+ written|inline_container.*(unexpected pos|writing file)", str(error)):
        return errno.ENOSPC, ""  # numpy's and torch's errors have no errno
    return 0, ""


def did_you_mean(given: str, valid: Iterable[str], limit: int = 3) -> str:
    """Return `"; did you mean 'x' or 'y'?"` for the nearest valid names, or a list of all of them.

    >>> did_you_mean("temperatur", ["temperature", "alpha"])
    "; did you mean 'temperature'?"
    >>> did_you_mean("zzz", ["temperature", "alpha"])
    '; valid: alpha, temperature'
    """
    names = sorted(set(valid))
    near = difflib.get_close_matches(given, names, n=limit, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    return "; valid: " + ", ".join(names) if names else ""
