"""Commands in forks of one process that has imported what they import: a test waits for what a command does alone.

What a command's own imports cost or say, tests/cli/test_commands.py asks of processes that are started for it.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests import ROOT

IMPORTED = (
    "kd_lightning.cli.train", "kd_lightning.cli.predict", "kd_lightning.cli.evaluate", "kd_lightning.cli.hydra_errors",
    "kd_lightning.pipeline.run", "kd_lightning.pipeline.compare", "kd_lightning.evaluation.report.sweep",
    "kd_lightning.evaluation.report.pictures", "lightning.pytorch.loggers.tensorboard", "tests.killer",
    "tests.signals", "tests.final_weights",
)  # fmt: skip


def command(
    *line: str, cwd: Path, environment: dict[str, str] | None = None, stdin: str = "", limit: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command as the shell would, after its imports.

    Args:
        line: Its name and arguments.
        cwd: Where it is started; what it prints is kept beside this folder.
        environment: Variables besides those of this process.
        stdin: What it can read.
        limit: Seconds after which it is stopped.
    """
    asked = {
        "line": line, "folder": str(cwd), "environment": {**os.environ, **(environment or {})}, "stdin": stdin,
        "limit": limit,
    }  # fmt: skip
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    said = server.stdout.readline()
    assert said, "the process that forks has died"
    code, out, err = json.loads(said)
    if code is None:
        raise subprocess.TimeoutExpired(line, limit, out, err)
    return subprocess.CompletedProcess(line, code, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None
    atexit.register(server.stdin.close)  # at which it ends
    return server


def _serve() -> None:
    """Run what is asked for, a line each, until nobody can ask any more."""
    from faults.process import preload

    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    preload(IMPORTED)
    for line in asked:
        print(json.dumps(_run(**json.loads(line))), file=answers)


def _run(
    line: list[str], folder: str, environment: dict[str, str], stdin: str, limit: float
) -> tuple[int | None, str, str]:
    from faults import process

    def prepare() -> None:
        os.environ.clear()
        os.environ.update(environment)

    home: Any = environment.get("KD_LIGHTNING_HOME")
    ended = process.command(line, Path(folder), home, prepare=prepare, stdin=stdin, limit=limit)
    return ended.code, ended.out, ended.err


if __name__ == "__main__":
    _serve()
