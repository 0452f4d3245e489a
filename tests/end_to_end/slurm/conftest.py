"""The local SLURM of scripts/slurm/local_cluster.sh, for the tests of this folder."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests import ROOT
from tests.waiting import wait_for

SCRIPT = ROOT / "scripts" / "slurm" / "local_cluster.sh"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A running SLURM that `sbatch` and the like talk to.

    Brought up where it is not running, and then stopped after the last test of the last pytest worker that uses it.
    """
    folder = Path(os.environ.get("KD_SLURM_DIR", "/tmp/kd-slurm"))
    ours = folder / "started-by-tests"
    with open(f"{folder}.tests", "w") as used, pytest.MonkeyPatch.context() as environment:
        with _starting(folder):
            found = (folder / "env.sh").is_file()
            started = subprocess.run([SCRIPT, "start"], capture_output=True, text=True, timeout=300)
            if started.returncode:
                pytest.skip(f"no SLURM here: {started.stderr.strip().splitlines()[-1]}")
            if not found:
                ours.touch()
            assert _locked(used, fcntl.LOCK_SH)
        environment.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
        yield
        with _starting(folder):
            if ours.exists() and _locked(used, fcntl.LOCK_EX):  # else another worker still uses it, and stops it
                ours.unlink()
                subprocess.run([SCRIPT, "stop"], check=True, timeout=120)


@contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """Be the only worker that starts or stops it, which takes minutes at most."""
    with open(f"{folder}.starting", "w") as lock:
        wait_for(lambda: _locked(lock, fcntl.LOCK_EX), f"another worker that starts or stops {folder}", timeout=450)
        yield


def _locked(file: IO[str], kind: int) -> bool:
    """Lock a file unless another worker's lock excludes it; the system releases what a dead one held."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
