"""How many threads a process should use, so that several jobs on a machine do not stand in each other's way."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return the cores this process may use: the machine's, less what affinity, container or SLURM take away."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if _QUOTA.is_file():  # torch counts the cores that it sees, not the share of their time that it gets
        quota, period = _QUOTA.read_text().split()
        found += [math.ceil(int(quota) / int(period))] if quota != "max" else []
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        found.append(int(slurm))
    return max(1, min(found))


def settle_threads() -> None:
    """Have torch use these cores, no more; `OMP_NUM_THREADS` has the last word."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
