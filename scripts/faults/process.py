"""Commands as forks of one process that has imported everything: a trial costs what it does, without the imports."""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

COMMANDS = {
    "kd-train": "kd_lightning.cli.train", "kd-cache": "kd_lightning.cli.cache", "kd-eval": "kd_lightning.cli.evaluate",
    "kd-predict": "kd_lightning.cli.predict", "kd-export": "kd_lightning.cli.export",
    "kd-benchmark": "kd_lightning.cli.benchmark", "kd-report": "kd_lightning.cli.report",
    "kd-cli": "kd_lightning.cli.lightning", "kd-config": "kd_lightning.cli.export_config",
}  # fmt: skip
PRELOADED = (
    *COMMANDS.values(), "kd_lightning.pipeline.validation", "kd_lightning.pipeline.compare",
    "kd_lightning.pipeline.run", "kd_lightning.runtime.log_filters",
    "kd_lightning.cli.hydra_errors", "kd_lightning.export.load",
    "kd_lightning.export.write",
    "kd_lightning.export.formats.onnx", "kd_lightning.export.formats.pt2", "kd_lightning.export.parity",
    "kd_lightning.export.card", "kd_lightning.export.graph", "kd_lightning.evaluation.report.sweep",
    "kd_lightning.evaluation.report.pictures", "kd_lightning.teachers.cache.upkeep",
    "kd_lightning.data.sources.hf_dataset",
    "kd_lightning.data.sources.reviews", "onnxscript.function_libs.torch_lib.ops",
    "torch.utils.tensorboard", "lightning.pytorch.loggers.tensorboard", "matplotlib.backends.backend_agg", "pandas",
    "pyarrow.parquet", "transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "torch._dynamo", "torch.onnx", "torch.export", "onnx", "onnxscript",
    "hydra", "sympy.combinatorics", "networkx", "rich.table", "rich._emoji_codes", "jsonargparse", "typeshed_client",
    "PIL.PngImagePlugin", "transformers.optimization", "transformers.trainer_utils", "omegaconf",
)  # fmt: skip
PATIENCE = 120.0
"""Seconds that a command may take; the slowest takes a tenth of it on a quiet machine."""
LONGEST = 3600.0
"""Seconds that a trial, which is several commands, may take."""
FOREIGN = re.compile(r"^(Traceback |Error executing job|Set the environment|usage:|Detected )|Warning: ", re.MULTILINE)
"""What other programs' lines look like, unlike our notices of what was seen in the data."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code, negative for the signal that ended it; None where it had to be stopped.
        out: What it printed.
        err: What it printed to standard error.
        seconds: On the clock.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def crashed(self) -> bool:
        """Whether a traceback was printed, or a signal came that nobody sent."""
        return any(line.startswith("Traceback ") for line in self.err.splitlines())

    @property
    def in_one_line(self) -> bool:
        """Whether it ended with one line of its own, and nobody else's; argparse's usage counts as one."""
        own = [line for line in self.err.splitlines() if line.startswith("kd-")]
        foreign = FOREIGN.search(self.err)
        return len(own) == 1 and own[0] == self.last and (foreign is None or ": error: " in self.last)

    @property
    def last(self) -> str:
        """The last line of standard error."""
        return (self.err.strip().splitlines() or [""])[-1]


def preload(names: Sequence[str] = PRELOADED) -> None:
    """Import what the commands import, one thread for each command to come."""
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
    os.environ.update(COLUMNS="200", HF_HUB_OFFLINE="1", PIP_NO_INDEX="1")  # nothing is fetched
    for name in names:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    if threading.active_count() > 1:
        raise RuntimeError(f"a fork would lack these threads: {threading.enumerate()}")


def command(
    line: Sequence[str], folder: Path, home: Path, *, prepare: Callable[[], None] | None = None, stdin: str = "",
    limit: float = PATIENCE,
) -> Outcome:  # fmt: skip
    """Run a command in a fork of this process and wait for its end.

    Args:
        line: Its name and arguments.
        folder: Where it is started.
        home: Its `KD_LIGHTNING_HOME`.
        prepare: Called in the fork before it begins.
        stdin: What it can read.
        limit: Seconds after which it is stopped, with whatever it started.
    """
    out, err, text = (folder.parent / f".{kind}" for kind in ("out", "err", "in"))
    text.write_text(stdin, encoding="utf-8", errors="surrogateescape")
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(line, folder, home, prepare, out, err, text)
    status = _awaited(child, limit)
    seconds = time.monotonic() - started
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in (out, err)]
    return Outcome(None if status is None else os.waitstatus_to_exitcode(status), *texts, seconds)


def _awaited(child: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(
    line: Sequence[str], folder: Path, home: Path, prepare: Callable[[], None] | None, out: Path, err: Path, text: Path
) -> NoReturn:
    """Be the command, from its first line to its exit code."""
    os.setpgid(0, 0)
    for number, file, flags in (
        (0, text, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):  # fmt: skip
        os.dup2(os.open(file, flags, 0o644), number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["KD_LIGHTNING_HOME"] = str(home)
    os.chdir(folder)
    sys.argv = list(line)
    code = 70
    try:
        if prepare is not None:
            prepare()
        code = _exit_code(importlib.import_module(COMMANDS[line[0]]).main)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    """Do what Python does with what leaves a program."""
    try:
        main()
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def in_lanes(trials: Sequence[Callable[[], dict[str, Any]]], lanes: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Run trials in so many processes at a time, and yield what each returns as it ends.

    Args:
        trials: Each is called once, in a fork of this process.
        lanes: How many processes.
        folder: Where they write down what they find.
    """
    fork = multiprocessing.get_context("fork")
    following = fork.Value("i", 0)

    def work(file: Path) -> None:
        with file.open("w", encoding="utf-8", buffering=1) as found:
            while True:
                with following.get_lock():
                    number, following.value = following.value, following.value + 1
                if number >= len(trials):
                    return
                found.write(json.dumps(trials[number]()) + "\n")

    files = [folder / f"lane-{number}.jsonl" for number in range(lanes)]
    workers = [fork.Process(target=work, args=(file,)) for file in files]
    for worker in workers:
        worker.start()
    read, heard = [0] * lanes, time.monotonic()
    while True:
        running = any(worker.is_alive() for worker in workers)
        for number, file in enumerate(files):
            lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
            yield from map(json.loads, lines[read[number] :])
            if len(lines) > read[number]:
                read[number], heard = len(lines), time.monotonic()
        dead, late = any(worker.exitcode for worker in workers), time.monotonic() - heard > LONGEST
        if dead or late:  # a dead one may have held the lock that the others wait for
            for worker in workers:
                worker.kill()
            raise RuntimeError(
                "a process of the campaign itself ended early: its traceback is above"
                if dead else f"no trial has ended for {LONGEST:.0f} s"
            )  # fmt: skip
        if not running:
            return
        time.sleep(0.2)


def forked(function: Callable[[], Any]) -> Any:
    """Call a function in a fork, so that what it imports, starts and sets stays there, and return what it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(LONGEST))  # which ends it
        try:
            with os.fdopen(writing, "w", encoding="utf-8") as file:
                json.dump(function(), file)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as file:
        found = file.read()
    _, status = os.waitpid(child, 0)
    if not found:
        raise RuntimeError(f"a fork of the campaign ended with exit code {os.waitstatus_to_exitcode(status)}")
    return json.loads(found)
