"""What SLURM's own commands do and say."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from kd_lightning.runtime.errors import KDError

PATIENCE = 120
"""Seconds that one of SLURM's commands may take; a busy controller takes some tens."""


def available(program: str = "sbatch") -> bool:
    """Return whether one of SLURM's commands is on PATH."""
    return shutil.which(program) is not None


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, however it ends.

    Raises:
        KDError: It does not end, since SLURM's controller does not react.
    """
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise KDError(
            f"{program} has not ended after {PATIENCE} s: is SLURM's controller up (scontrol ping)?"
        ) from None


def submit(script: Path, options: Sequence[str]) -> str:
    """Hand a batch script to sbatch; returns the job's id.

    Raises:
        KDError: sbatch refuses it; says why.
    """
    done = run("sbatch", "--parsable", *options, str(script))
    if done.returncode:
        raise KDError(f"sbatch refuses the job: {_last_line(done.stderr)}")
    return done.stdout.strip().partition(";")[0]  # a federation's cluster follows


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue again."""
    if jobs:
        run("scancel", *jobs).check_returncode()


def queued(jobs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return (state, reason) of those jobs that run or wait, each task of an array under an id of its own.

    Raises:
        KDError: squeue fails; says why.
    """
    rows = _ask("squeue", "--noheader", "--array", "--format=%i|%T|%r", jobs=jobs)
    return {job: (state, reason) for job, state, reason in rows}


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """Return how SLURM's accounting says that jobs ended: COMPLETED, FAILED, TIMEOUT, CANCELLED, ..."""
    rows = _ask("sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", jobs=jobs)
    return {job: state.split()[0] for job, state in rows}  # "CANCELLED by 0"


_KNOWS_NONE = ("Invalid job id", "accounting storage is disabled")
"""What the two say where they know none of the jobs, or no job at all."""


def _ask(program: str, *options: str, jobs: Iterable[str]) -> list[list[str]]:
    numbers = sorted({job.partition("_")[0] for job in jobs})
    if not numbers or not available(program):
        return []
    done = run(program, *options, f"--jobs={','.join(numbers)}")
    if done.returncode and not any(text in done.stderr for text in _KNOWS_NONE):
        raise KDError(f"{program} fails: {_last_line(done.stderr)}")
    return [line.split("|") for line in done.stdout.splitlines()]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it does not say why"])[-1]
