"""The local SLURM of scripts/slurm/local_cluster.sh, for the tests of this folder."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "slurm" / "local_cluster.sh"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A running SLURM that `sbatch` and the like talk to.

    Brought up where it is not running, and then stopped after the last test of the last pytest worker that uses it.
    """
    folder = Path(os.environ.get("KD_SLURM_DIR", "/tmp/kd-slurm"))
    ours = folder / "started-by-tests"
    with open(f"{folder}.tests", "w") as lock, pytest.MonkeyPatch.context() as environment:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = (folder / "env.sh").is_file()
        started = subprocess.run([SCRIPT, "start"], capture_output=True, text=True, timeout=300)
        if started.returncode:
            pytest.skip(f"no SLURM here: {started.stderr.strip().splitlines()[-1]}")
        if not found:
            ours.touch()
        fcntl.flock(lock, fcntl.LOCK_SH)
        environment.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
        yield
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another worker still uses it, and stops it
            return
        if ours.exists():
            ours.unlink()
            subprocess.run([SCRIPT, "stop"], check=True, timeout=120)
