"""Whether a teacher's logits are divided by a temperature, and by which."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.evaluation.report.findings import BADLY_CALIBRATED
from kd_lightning.tasks.metrics import CalibrationError
from kd_lightning.teachers import fit_temperature


def temperature_of(logits: Tensor, labels: Tensor, auto: bool, say: Callable[[str], None]) -> float:
    """Return the temperature that fits a teacher's logits `(N, C)` to labels `(N,)`.

    With `auto` it is 1 where there is nothing badly wrong.
    """
    if auto and not len(labels):
        return 1.0
    measured = CalibrationError()
    measured.update(logits, labels)
    error, temperature = float(measured.compute()), fit_temperature(logits, labels)
    before, after = (float(F.cross_entropy(logits / t, labels)) for t in (1.0, temperature))
    # of few examples a good teacher's error is above the bound, too; a likelihood ratio of 4 is two standard errors
    by_chance = 2 * len(labels) * (before - after) <= 4
    if auto and (error <= BADLY_CALIBRATED or by_chance):
        return 1.0
    effect = f"its cross-entropy goes from {before:.3f} to {after:.3f}"
    why = f"its calibration error (ECE) is {error:.3f}, {effect}"
    say(f"teacher  calibrated: logits divided by {temperature:.3f}; {why}")
    return temperature
