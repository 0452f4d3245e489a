"""The number of threads of a process, so that several jobs on a machine do not compete."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return the cores this process may use, by affinity, container and SLURM."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if _QUOTA.is_file():  # torch counts visible cores, not the quota of their time
        quota, period = _QUOTA.read_text().split()
        found += [math.ceil(int(quota) / int(period))] if quota != "max" else []
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        found.append(int(slurm))
    return max(1, min(found))


def settle_threads() -> None:
    """Limit torch to these cores, unless `OMP_NUM_THREADS` is set."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
