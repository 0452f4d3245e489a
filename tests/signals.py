"""A callback that sends signals to the command that runs it, at given steps."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L


class SignalAt(L.Callback):
    """Sends what `SIGNALS_AT` says, in the stage whose folder is called `stage`.

    `SIGUSR1:11:own` is SIGUSR1 in the first process after 11 optimizer steps, to itself; `parent` instead of `own` is
    to the one that spawned it. Nothing where the variable is not set, so that a training that is not interrupted has
    the same settings.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if "SIGNALS_AT" not in os.environ or not trainer.default_root_dir.endswith(self.stage):
            return
        name, step, whom = os.environ["SIGNALS_AT"].split(":")
        if trainer.global_step == int(step) and trainer.is_global_zero:
            os.kill(os.getpid() if whom == "own" else os.getppid(), signal.Signals[name])
