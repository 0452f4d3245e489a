"""What a signal to stop (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2) does to a command: nothing at once while a network trains.

The handler only notes the signal. A training saves at the end of an optimizer step that all its processes agree on (see
`callbacks.preemption`) and the command then leaves; outside of trainings, where nothing is half done that a kill could
lose, it leaves at once. How, depends on who started it:

- plain sbatch or srun: after SIGUSR1 or SIGUSR2 the first process puts the job back in the queue. After SIGTERM SLURM
  itself decides whether the job goes on (a preemption) or not (scancel), so we wait for that;
- submitit: it handled these signals before us and does what it always does, after the training has saved;
- no cluster: the command ends in one line, and the same command goes on.

Ctrl-C is somebody who wants it to end: nothing is put back in a queue, and a second one ends the command at once.
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
"""The later one counts, should several come."""

_before: dict[int, Any] = {}
"""Who handled a signal before us; empty until we do."""
_asked: signal.Signals | None = None
_held = False


def watch() -> None:
    """Handle the signals from now on, and those that were blocked until now (`env --block-signal`)."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        before = signal.signal(number, _heard)
        _before.setdefault(number, before)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def watching() -> bool:
    """Return whether this process handles the signals."""
    return bool(_before)


def asked() -> signal.Signals | None:
    """Return the signal to stop, if one came."""
    return _asked


def ask(number: signal.Signals) -> None:
    """Note a signal that came to this process, or to another one of the command."""
    global _asked
    if _asked is None or SIGNALS.index(number) > SIGNALS.index(_asked):
        _asked = number


def hold() -> None:
    """Leave the answer to a signal to the training that begins here."""
    global _held
    _held = True


@contextmanager
def holding() -> Iterator[None]:
    """Let a block, which trains and keeps what it trained, end before a signal counts, or raise `Interrupted`.

    Raises:
        SystemExit: A signal came; the job, or the same command, goes on later.
    """
    global _held
    hold()
    try:
        yield
    except Interrupted as stopped:
        if _asked:
            _leave(str(stopped))
        raise
    except Exception as error:
        if _asked and _from_spawned(error):
            _leave("the training's processes have stopped")
        raise
    finally:
        _held = False
    if _asked:
        if rank() == 0:
            _leave("the stage is finished")
        _wait_for_the_first()


def _heard(number: int, frame: FrameType | None) -> None:
    """Handle a signal."""
    if number == signal.SIGTERM and callable(_before[number]):
        _before[number](number, frame)  # submitit's, which lets it pass: another signal follows
        return
    if number == signal.SIGINT == _asked:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    ask(signal.Signals(number))
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
    """End this process here and now.

    An exception from a handler is raised in whatever runs at that moment: a destructor swallows it, an import that it
    breaks off is tried again by others. Nothing is half done here that a kill could lose.
    """
    if isinstance(left.code, str):
        print(left.code, file=sys.stderr, flush=True)
    with suppress(RuntimeError, OSError):  # it is being written to, or nobody reads it any more
        sys.stdout.flush()
    os._exit(left.code if isinstance(left.code, int) else 1)


def _wait_for_the_first() -> None:
    """Go on until the first process puts the job back, which ends this one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(where: str) -> NoReturn:
    """End this process, and see to it that the job goes on."""
    assert _asked is not None
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if _asked is signal.SIGINT:
        if rank() == 0:
            print(f"kd-train: interrupted: {where}; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(130)
    theirs = _submitit()
    if theirs is not None:
        _hand_over(theirs)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    job = job_id()
    if job is None:
        sys.exit(f"kd-train: {_asked.name}: {where}; the same command goes on" if rank() == 0 else 1)
    print(f"kd-train: {_asked.name} in process {rank()} of job {job}: {where}", flush=True)
    if _asked is signal.SIGTERM:
        while True:  # SLURM takes a job that ends now for a finished one, and would not start it again
            signal.pause()
    if rank() == 0:
        _requeue(job)
    sys.exit(0)


def _requeue(job: str) -> None:
    """Put this job back in the queue, from where it starts with the same command.

    Raises:
        SystemExit: SLURM refuses.
    """
    try:
        done = run("scontrol", "requeue", job)
        refused, why = done.returncode > 0, done.stderr.strip()  # less than 0: what it asked for ended it, too
    except KDError as error:
        refused, why = True, str(error)
    if refused:
        sys.exit(f"kd-train: job {job} was not put back in the queue ({why}): submit it again to go on")
    print(f"kd-train: job {job} is back in the queue", flush=True)


def _submitit() -> Callable[[int, FrameType | None], None] | None:
    """Return submitit's handler that puts the job back; that of SIGTERM does not, it only lets the signal pass."""
    before = (_before.get(number) for number in (signal.SIGUSR2, signal.SIGUSR1))
    return next((handler for handler in before if callable(handler)), None)


def _hand_over(theirs: Callable[[int, FrameType | None], None]) -> NoReturn:
    """Let submitit put the job back, which its first process does and the others leave to it."""
    assert _asked is not None
    theirs(_asked, None)
    sys.exit(0)


def _from_spawned(error: Exception) -> bool:
    """Return whether an error says how a process that torch spawned has ended."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    if isinstance(error, ProcessExitedException):
        return error.signal_name in {number.name for number in SIGNALS}
    return isinstance(error, ProcessRaisedException) and Interrupted.__name__ in str(error)
