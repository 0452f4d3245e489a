"""Several processes of one command, one per device, started by srun, torchrun or submitit.

Each of them runs the whole command. They train together; the first one prepares data, runs the teacher and writes files
while the others wait.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kd_lightning.runtime.errors import KDError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

_PATIENCE = timedelta(days=7)
"""How long the others wait for the first one, which may run a teacher on millions of examples."""
_waiting: list[Any] = []
"""The process group for waiting, once it exists."""
_inside = False
"""Whether this process is in a block of `first`."""


def launched() -> int:
    """Return how many processes a launcher started for this command; 1 without one.

    Under SLURM these are the tasks of an `srun` step: a command that a batch script runs without `srun` is alone,
    however many tasks the job has.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def environment() -> ClusterEnvironment:
    """Return Lightning's cluster environment for the other processes.

    Given to every trainer: by default, Lightning assumes that `srun` started any SLURM job, and installs
    a requeue handler that saves inside the signal handler (see `callbacks.preemption`).
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if "TORCHELASTIC_RUN_ID" in os.environ:
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if "SLURM_STEP_NUM_TASKS" in os.environ else LightningEnvironment()


def join() -> None:
    """Join the other processes of this command, once; without any, do nothing.

    Raises:
        KDError: There are others, but they cannot be joined.
    """
    if launched() == 1 or _waiting:
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise KDError(f"{launched()} processes were started, and this build of torch has no torch.distributed")
    try:
        here = environment()
    except RuntimeError as error:  # srun --ntasks does not fix the number of tasks per machine
        raise KDError(str(error)) from error
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = here.main_address, str(here.main_port)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=here.global_rank(), world_size=here.world_size())
    atexit.register(leave)
    _waiting.append(dist.new_group(backend="gloo", timeout=_PATIENCE))


def leave() -> None:
    """Leave the process group; otherwise gloo's threads may abort this process at its exit."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number among those of the command; 0 without others."""
    if launched() == 1:
        return 0
    return int(os.environ["RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID"])


@contextmanager
def first() -> Iterator[None]:
    """Run a block in the first process while the others wait, then in these, which find its results.

    If it fails in the first process, the others exit silently, so that the reason is printed once. Nested blocks are
    part of the outer one.
    """
    global _inside
    if not _waiting or _inside:
        yield
        return
    if rank() > 0 and not _hear():
        sys.exit(1)
    done, _inside = False, True
    try:
        yield
        done = True
    finally:
        _inside = False
        if rank() == 0:
            _tell(done)


def _tell(done: bool) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([done], src=0, group=_waiting[0])


def _hear() -> bool:
    import torch.distributed as dist

    succeeded = [False]
    dist.broadcast_object_list(succeeded, src=0, group=_waiting[0])
    return succeeded[0]
