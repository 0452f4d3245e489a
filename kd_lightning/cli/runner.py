"""Shared by the commands: errors in one line, exit codes, `--trust`, set-up before any work."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from kd_lightning.config.trust import trusting
from kd_lightning.runtime.errors import ConfigError, DataError, KDError, environment_fault
from kd_lightning.runtime.processes import rank

FAILURE, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit codes. argparse ends with 2 as well, and a shell expects 130 after Ctrl-C."""


@contextmanager
def command(name: str, kept: str, first_only: bool = False) -> Iterator[None]:
    """End a command with one line for any error; a defect keeps its traceback. Also a decorator.

    Args:
        name: The command's name, the line's prefix.
        kept: The work that is kept after Ctrl-C.
        first_only: Whether only the first of several processes prints the line.

    Raises:
        SystemExit: With `MISTAKE` for what the user can correct in the command line, the configuration or the data,
            with `INTERRUPTED` after Ctrl-C, and with `FAILURE` for anything else that has a line.
    """
    try:
        yield
    except KeyboardInterrupt:
        _leave(f"{name}: interrupted; {kept}", INTERRUPTED)
    except Exception as error:
        reason = error if isinstance(error, KDError) else environment_fault(error)
        if reason is None:
            raise
        line = "" if first_only and rank() > 0 else f"{name}: {reason}"
        _leave(line, MISTAKE if isinstance(error, ConfigError | DataError) else FAILURE)


def _leave(line: str, code: int) -> NoReturn:
    """Print a line to standard error and exit; the exception has both, for calls from Python."""
    if line:
        print(line, file=sys.stderr, flush=True)
    left = SystemExit(line)
    left.code = code
    raise left


def typed(name: str, arguments: Sequence[str] | None) -> str:
    """Return a command line, for the files that store it.

    Args:
        name: The command's name.
        arguments: The arguments of its `main`; None: those of this process.
    """
    return shlex.join([name, *(sys.argv[1:] if arguments is None else arguments)])


def import_from_here() -> None:
    """Let modules in the working folder be imported, for the user's networks and losses."""
    sys.path.insert(0, os.getcwd())


def begin() -> None:
    """Silence uninformative messages and set the number of threads; call it where torch is needed."""
    from kd_lightning.runtime.log_filters import quiet
    from kd_lightning.runtime.threads import settle_threads

    quiet()
    settle_threads()


def trust_option(parser: argparse.ArgumentParser) -> None:
    """Add `--trust` to a command that reads runs or exports."""
    parser.add_argument(
        "--trust", action="store_true",
        help="let the folders run code that they contain or name: only for folders from people you trust",
    )  # fmt: skip


@contextmanager
def trusting_folders(trust: bool) -> Iterator[None]:
    """Let files loaded in this block run code, if `--trust` was given, also from modules here."""
    if trust:
        import_from_here()
    with trusting(trust):
        yield


def run_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser for a command on a finished run, with run, seed and JSON options."""
    parser = argparse.ArgumentParser(name, description=description)
    parser.add_argument("run", type=Path, help="run folder, folder of one of its stages (RUN/teacher), or an export")
    parser.add_argument("--seed", type=int, help="which seed's student; default: the best on validation")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    trust_option(parser)
    return parser
