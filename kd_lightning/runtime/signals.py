"""Handles signals to stop (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2): a training saves before it ends.

The handler only notes the signal. A training saves at the end of an optimizer step that all its processes agree on (see
`callbacks.preemption`), then the command exits. Outside of trainings, where a kill loses nothing, it exits at once.
What follows depends on how it was started:

- plain sbatch or srun: after SIGUSR1 or SIGUSR2 the first process requeues the job. After SIGTERM SLURM itself
  decides whether the job continues (a preemption) or not (scancel), so we wait for that;
- submitit: its own handlers run after the training has saved;
- no cluster: the command exits with one line, and the same command resumes.

Ctrl-C never requeues, and a second one ends the command at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, NoReturn

from kd_lightning.runtime.errors import Interrupted, KDError
from kd_lightning.runtime.processes import rank
from kd_lightning.runtime.slurm_logs import job_id
from kd_lightning.runtime.slurm_queue import run

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Of several signals, the later in this list counts."""

_before: dict[int, Any] = {}
"""The previous handlers; empty until ours are installed."""
_received: signal.Signals | None = None
_held = False


def watch() -> None:
    """Install the handlers, and unblock signals that were blocked (`env --block-signal`)."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        before = signal.signal(number, _heard)
        _before.setdefault(number, before)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def watching() -> bool:
    """Return whether this process handles the signals."""
    return bool(_before)


def received() -> signal.Signals | None:
    """Return the signal to stop, if one was received."""
    return _received


def receive(number: signal.Signals) -> None:
    """Record a signal to this process or to another one of the command."""
    global _received
    if _received is None or SIGNALS.index(number) > SIGNALS.index(_received):
        _received = number


def hold() -> None:
    """Leave signals to the training that begins here."""
    global _held
    _held = True


@contextmanager
def holding() -> Iterator[None]:
    """Run a block that trains and saves; a signal takes effect after it, or raises `Interrupted` in it.

    Raises:
        SystemExit: A signal was received; the job, or the same command, resumes later.
    """
    global _held
    hold()
    try:
        yield
    except Interrupted as stopped:
        if _received:
            _leave(str(stopped))
        raise
    except Exception as error:
        if _received and _from_spawned(error):
            _leave("the training's processes have stopped")
        raise
    finally:
        _held = False
    if _received:
        if rank() == 0:
            _leave("the stage is finished")
        _wait_for_the_first()


def _heard(number: int, frame: FrameType | None) -> None:
    """Handle a signal."""
    if number == signal.SIGTERM and callable(_before[number]):
        _before[number](number, frame)  # submitit's, which ignores it: another signal follows
        return
    if number == signal.SIGINT == _received:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    receive(signal.Signals(number))
    if _held:
        if number == signal.SIGINT and rank() == 0:
            os.write(2, b"kd-train: saving at the end of this step; another Ctrl-C ends it at once\n")
        for child in multiprocessing.active_children():
            if isinstance(child, SpawnProcess) and child.pid is not None:  # the training's own (ddp_spawn)
                # A terminal sends Ctrl-C to all of them, and a second one would end them.
                os.kill(child.pid, signal.SIGTERM if number == signal.SIGINT else number)
    elif rank() > 0 and number != signal.SIGINT:
        _wait_for_the_first()
    elif number != signal.SIGTERM or job_id() is None:
        try:
            _leave("nothing was being trained")
        except SystemExit as left:
            _end(left)


def _end(left: SystemExit) -> NoReturn:
    """End this process immediately.

    An exception from a handler is raised in whatever runs at that moment: a destructor swallows it, a
    broken import is retried by others. A kill loses nothing here.
    """
    if isinstance(left.code, str):
        print(left.code, file=sys.stderr, flush=True)
    with suppress(RuntimeError, OSError):  # it is being written to, or closed
        sys.stdout.flush()
    os._exit(left.code if isinstance(left.code, int) else 1)


def _wait_for_the_first() -> None:
    """Wait until the first process requeues the job, which ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(where: str) -> NoReturn:
    """End this process, and make sure that the job continues."""
    assert _received is not None
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if _received is signal.SIGINT:
        if rank() == 0:
            print(f"kd-train: interrupted: {where}; run the same command to resume", file=sys.stderr, flush=True)
        sys.exit(130)
    theirs = _submitit()
    if theirs is not None:
        _hand_over(theirs)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    job = job_id()
    if job is None:
        sys.exit(f"kd-train: {_received.name}: {where}; run the same command to resume" if rank() == 0 else 1)
    print(f"kd-train: {_received.name} in process {rank()} of job {job}: {where}", flush=True)
    if _received is signal.SIGTERM:
        while True:  # if the job ended now, SLURM would count it as finished and not restart it
            signal.pause()
    if rank() == 0:
        _requeue(job)
    sys.exit(0)


def _requeue(job: str) -> None:
    """Requeue this job, which then starts with the same command.

    Raises:
        SystemExit: SLURM refuses.
    """
    try:
        done = run("scontrol", "requeue", job)
        refused, why = done.returncode > 0, done.stderr.strip()  # less than 0: the requeue ended it too
    except KDError as error:
        refused, why = True, str(error)
    if refused:
        sys.exit(f"kd-train: job {job} was not requeued ({why}): submit it again to resume")
    print(f"kd-train: job {job} is requeued", flush=True)


def _submitit() -> Callable[[int, FrameType | None], None] | None:
    """Return submitit's handler that requeues the job; that of SIGTERM does not."""
    before = (_before.get(number) for number in (signal.SIGUSR2, signal.SIGUSR1))
    return next((handler for handler in before if callable(handler)), None)


def _hand_over(theirs: Callable[[int, FrameType | None], None]) -> NoReturn:
    """Let submitit requeue the job, which only its first process does."""
    assert _received is not None
    theirs(_received, None)
    sys.exit(0)


def _from_spawned(error: Exception) -> bool:
    """Return whether an error reports the end of a process that torch spawned."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    if isinstance(error, ProcessExitedException):
        return error.signal_name in {number.name for number in SIGNALS}
    return isinstance(error, ProcessRaisedException) and Interrupted.__name__ in str(error)
