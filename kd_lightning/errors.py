"""Errors a user can act on. The entry points print them as one line, without a traceback."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec

Given = ParamSpec("Given")


class KDError(Exception):
    """Something the user can mend; the message says what was given, what was expected and what to change."""


class Interrupted(KDError):
    """A training that was told to stop, and left what it takes to go on."""


class Diverged(KDError):
    """A training whose loss, gradient or validation score is no number any more."""


class ConfigError(KDError):
    """A configuration key that is unknown, of the wrong type or value, or in conflict with another."""


class DataError(KDError):
    """A data file or data set that cannot be used as it is: names the file, line and column."""


class CacheError(KDError):
    """A stored teacher output that is missing, damaged or belongs to something else."""


def did_you_mean(given: str, valid: Iterable[str], limit: int = 3) -> str:
    """Return `"; did you mean 'x' or 'y'?"` for the nearest valid names, or a list of them all when none is near.

    >>> did_you_mean("temperatur", ["temperature", "alpha"])
    "; did you mean 'temperature'?"
    >>> did_you_mean("zzz", ["temperature", "alpha"])
    '; valid: alpha, temperature'
    """
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=limit, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    return "; valid: " + ", ".join(names) if names else ""


def interruptible(command: str, kept: str) -> Callable[[Callable[Given, None]], Callable[Given, None]]:
    """Have Ctrl-C end a command with one line and the shell's code for it, 130.

    Args:
        command: Its name.
        kept: What of its work stays, for the line.
    """

    def wrapped(main: Callable[Given, None]) -> Callable[Given, None]:
        @functools.wraps(main)
        def run(*arguments: Given.args, **named: Given.kwargs) -> None:
            try:
                main(*arguments, **named)
            except KeyboardInterrupt:
                print(f"{command}: interrupted; {kept}", file=sys.stderr)
                sys.exit(130)

        return run

    return wrapped
