"""Hydra's callback that ends every `kd-train -m` with its report."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from kd_lightning.config.sweep import OVERRIDES
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.processes import rank


class SweepReport(Callback):
    """Writes the report of a sweep at its end, also if points failed, in the starting process.

    Hydra calls `on_multirun_end` only if every point succeeded; for others, and after an
    interruption, the report is written at the end of the process.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Store the sweep's folder."""
        self.folder = Path(config.hydra.sweep.dir)
        if rank() == 0:
            atexit.register(self.report)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report now."""
        atexit.unregister(self.report)
        if rank() == 0:
            self.report()

    def report(self) -> None:
        """Write the report and print what came out; without any point there is no report."""
        from kd_lightning.evaluation.report.sweep import headline, report_sweep

        if not any(self.folder.glob(f"*/{OVERRIDES}")):
            return
        try:
            print(headline(report_sweep(self.folder), self.folder), flush=True)
        except KDError as error:
            print(f"no report of the sweep: {error}", flush=True)
