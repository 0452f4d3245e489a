"""How long a command takes to react: `kd-train --help`, `--cfg job`, and to the first training step on warm caches.

The first step is that of `experiment=quickstart` with a finished teacher whose outputs are stored: imports, reading the
data and the teacher, preflight, and setting up the training come before it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.common import Measure
from benchmarks.task import save_teacher

ROUNDS = 5
KD_TRAIN = str(Path(sys.executable).with_name("kd-train"))


class StopAtFirstStep(L.Callback):
    """Writes down when the first training step was done, and ends the run."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, *_: Any) -> None:
        """Write the time and leave."""
        Path(self.file).write_text(repr(time.time()))
        raise SystemExit(0)


def run() -> list[Measure]:
    """Return seconds from starting the command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher")
        quickstart = [
            "experiment=quickstart", f"teacher.checkpoint={folder / 'teacher'}", "stages=[distill]",
            "data.views=0", "data.transfer=[]",  # fewer outputs to store beforehand; nothing else depends on them
        ]  # fmt: skip
        subprocess.run(
            [KD_TRAIN.replace("kd-train", "kd-cache"), "build", *quickstart, f"run_dir={folder / 'run'}"], check=True,
            timeout=600,
        )  # fmt: skip
        return [
            Measure("kd-train --help", [_seconds("--help") for _ in range(ROUNDS)], "s", "< 3"),
            Measure("kd-train --cfg job", [_seconds("--cfg", "job", *quickstart) for _ in range(ROUNDS)], "s", "< 3"),
            Measure(
                "kd-train to the first step", [_first_step(folder, i, quickstart) for i in range(ROUNDS)], "s", "< 12"
            ),
        ]


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([KD_TRAIN, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=600)
    return time.perf_counter() - started


def _first_step(folder: Path, number: int, quickstart: list[str]) -> float:
    file = folder / f"first_{number}"
    callback = ["+callbacks.stop._target_=benchmarks.start.StopAtFirstStep", f"+callbacks.stop.file={file}"]
    started = time.time()
    subprocess.run(
        [KD_TRAIN, *quickstart, f"run_dir={folder / f'run_{number}'}", *callback],
        check=True, cwd=Path(__file__).resolve().parent.parent, stdout=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip
    return float(file.read_text()) - started
