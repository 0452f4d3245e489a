"""Calls SLURM's commands: sbatch, squeue, sacct, scancel."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from kd_lightning.runtime.errors import KDError

PATIENCE = 120
"""Time limit of a SLURM command in seconds; a busy controller takes tens of seconds."""


def available(program: str = "sbatch") -> bool:
    """Return whether one of SLURM's commands is on PATH."""
    return shutil.which(program) is not None


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands and return its result.

    Raises:
        KDError: It does not finish: SLURM's controller does not respond.
    """
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise KDError(
            f"{program} did not finish within {PATIENCE} s: is SLURM's controller up (scontrol ping)?"
        ) from None


def submit(script: Path, options: Sequence[str]) -> str:
    """Submit a batch script with sbatch and return the job's id.

    Raises:
        KDError: sbatch refuses it.
    """
    done = run("sbatch", "--parsable", *options, str(script))
    if done.returncode:
        raise KDError(f"sbatch refuses the job: {_last_line(done.stderr)}")
    return done.stdout.strip().partition(";")[0]  # a federation's cluster follows


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs."""
    if jobs:
        run("scancel", *jobs).check_returncode()


def queued(jobs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return (state, reason) of those jobs that run or wait, each task of an array under an id of its own.

    Raises:
        KDError: squeue fails.
    """
    rows = _rows("squeue", "--noheader", "--array", "--format=%i|%T|%r", jobs=jobs)
    return {job: (state, reason) for job, state, reason in rows}


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """Return jobs' final states from SLURM's accounting: COMPLETED, FAILED, TIMEOUT, CANCELLED, ..."""
    rows = _rows("sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", jobs=jobs)
    return {job: state.split()[0] for job, state in rows}  # "CANCELLED by 0"


_KNOWS_NONE = ("Invalid job id", "accounting storage is disabled")
"""Errors of both for unknown jobs."""


def _rows(program: str, *options: str, jobs: Iterable[str]) -> list[list[str]]:
    numbers = sorted({job.partition("_")[0] for job in jobs})
    if not numbers or not available(program):
        return []
    done = run(program, *options, f"--jobs={','.join(numbers)}")
    if done.returncode and not any(text in done.stderr for text in _KNOWS_NONE):
        raise KDError(f"{program} fails: {_last_line(done.stderr)}")
    return [line.split("|") for line in done.stdout.splitlines()]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
