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
    """Reports on a sweep when it is over, in the process that started it, also when points of it have failed.

    Hydra tells its callbacks only of the end of sweeps in which every point went well; for the others, and for those
    that were interrupted, the end of the process is what remains.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the sweep is."""
        self.folder = Path(config.hydra.sweep.dir)
        if rank() == 0:
            atexit.register(self.report)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report now."""
        atexit.unregister(self.report)
        if rank() == 0:
            self.report()

    def report(self) -> None:
        """Write the report and print what came out; where no point has begun there is nothing to report."""
        from kd_lightning.evaluation.report.sweep import headline, report_sweep

        if not any(self.folder.glob(f"*/{OVERRIDES}")):
            return
        try:
            print(headline(report_sweep(self.folder), self.folder), flush=True)
        except KDError as error:
            print(f"no report of the sweep: {error}", flush=True)
