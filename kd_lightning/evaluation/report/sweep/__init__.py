"""The report of a sweep: which of its points is best, how sure that is, and what each parameter is worth.

`read_points` reads what a `kd-train -m` left behind, `build_sweep` makes one JSON document of it, and the page and the
pictures read that document alone. Nothing here imports torch.
"""

from kd_lightning.evaluation.report.sweep.build import build_sweep
from kd_lightning.evaluation.report.sweep.files import headline, report_sweep
from kd_lightning.evaluation.report.sweep.points import Point, read_points

__all__ = ["Point", "build_sweep", "headline", "read_points", "report_sweep"]
