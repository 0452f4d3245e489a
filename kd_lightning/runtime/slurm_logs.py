"""Links between a run's folder and its SLURM logs, in both directions."""

from __future__ import annotations

import os
from pathlib import Path

from kd_lightning.runtime.files import replacing
from kd_lightning.runtime.slurm_queue import available, run


def job_id() -> str | None:
    """Return this job's id, with its number in an array (`12_3`); None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def link_logs(folder: Path) -> None:
    """Under SLURM, log the run's folder and link the logs into it: `FOLDER/slurm/JOB.out`, `.err`.

    Only the first of several processes does this. A step on a terminal has no log to link.
    """
    job = job_id()
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0" or not available("scontrol"):
        return
    print(f"SLURM job {job} on {os.environ.get('SLURM_JOB_NODELIST')}: writes to {folder.absolute()}", flush=True)
    described = run("scontrol", "show", "job", job)
    described.check_returncode()
    for line in described.stdout.splitlines():
        name, _, log = line.strip().partition("=")
        if name in ("StdOut", "StdErr"):
            _link(folder / "slurm" / f"{job}{'.out' if name == 'StdOut' else '.err'}", Path(log))


def _link(link: Path, log: Path) -> None:
    with replacing(link) as temporary:
        temporary.symlink_to(os.path.relpath(log, link.parent.resolve()))
