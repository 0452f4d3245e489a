"""Shows progress: a bar in a terminal, otherwise one line per validation."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_READ_EVERY = 10


class StageProgress(L.Callback):
    """Shows the stage, its losses and scores, and the time left, over all optimizer steps.

    Args:
        stage: The stage's name, e.g. "baseline, seed 0".
        console: The output, a terminal or not.
    """

    def __init__(self, stage: str, console: Console | None = None) -> None:
        self.stage = stage
        self.console = console or Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._first_step, self._started = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step where training starts or resumes."""
        self._first_step, self._started = trainer.global_step, time.monotonic()
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(), TextColumn("{task.fields[scores]}"),
        )  # fmt: skip
        self._progress = Progress(*columns, console=self.console)
        self._progress.start()
        self._task = self._progress.add_task(
            self.stage, total=trainer.estimated_stepping_batches, completed=trainer.global_step, scores=""
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; read the losses only sometimes, since that synchronises with the device."""
        if self._progress is None:
            return
        if trainer.global_step % _READ_EVERY == 0:
            self._progress.update(self._task, completed=trainer.global_step, scores=_scores(trainer, pl_module))
        else:
            self._progress.update(self._task, completed=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without a terminal, print one line."""
        if self._progress is not None or not trainer.is_global_zero:
            return
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        total = trainer.estimated_stepping_batches
        seconds = time.monotonic() - self._started
        done = trainer.global_step - self._first_step
        left = f"{seconds / done * (total - trainer.global_step):.0f} s left" if done else ""
        self.console.print(
            f"{self.stage}  step {trainer.global_step}/{total:.0f}  {_scores(trainer, pl_module)}  {left}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar, also after an exception."""
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, scores=_scores(trainer, pl_module))
            self._progress.stop()
            self._progress = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the terminal before a traceback is printed."""
        self.teardown(trainer, pl_module, "fit")

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the live bar."""
        return {**self.__dict__, "_progress": None, "console": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle with a new console."""
        self.__dict__.update(state, console=Console())


def _scores(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    metrics, monitor = trainer.callback_metrics, getattr(getattr(pl_module, "task", None), "monitor", None)
    shown = ("train/loss", "val/loss", f"val/{monitor}")
    return "  ".join(f"{name} {float(metrics[name]):.3f}" for name in shown if name in metrics)
