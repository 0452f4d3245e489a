"""The report of a sweep: the best point, how certain that is, and the effect of each parameter.

`read_points` reads the folder of a `kd-train -m`, `build_sweep` makes one JSON document of it, and the page and the
pictures use only that document. Nothing here imports torch.
"""

from kd_lightning.evaluation.report.sweep.build import build_sweep
from kd_lightning.evaluation.report.sweep.files import headline, report_sweep
from kd_lightning.evaluation.report.sweep.points import Point, read_points

__all__ = ["Point", "build_sweep", "headline", "read_points", "report_sweep"]
