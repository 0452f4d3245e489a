"""A teacher with calibrated probabilities."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers.frozen import Teacher, WrappedTeacher
from kd_lightning.types import IGNORE, Batch, ModelOutput

LARGEST = 20.0
"""The temperature is searched between this and its inverse: for a teacher without errors none is the best."""


class CalibratedTeacher(WrappedTeacher):
    """Divides another teacher's logits by a temperature; see `fit_temperature`.

    The most likely class and the features do not change.

    Args:
        inner: The other teacher.
        temperature: The divisor.
    """

    def __init__(self, inner: Teacher, temperature: float) -> None:
        super().__init__(inner)
        self.temperature = temperature
        self.notes = {**inner.notes, "teacher_temperature": temperature}

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the other teacher's output with its logits divided by the temperature."""
        output = self.inner(batch)
        if output.sparse is not None:
            raise ConfigError(
                "teacher.calibrate divides all logits by a temperature, but teacher.cache_top_k (or cache_samples) "
                "keeps only some: set the one to false or the other to null"
            )
        return ModelOutput(output.logits / self.temperature, output.features)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""Return the temperature that minimises the cross-entropy (Guo et al. 2017, arXiv 1706.04599).

    .. math:: \arg\min_T \; - \sum_i \log \mathrm{softmax}(z_i / T)_{y_i}

    In the inverse temperature :math:`\beta = 1 / T` the loss is convex: its slope, the sum of
    :math:`\mathbb{E}_{\mathrm{softmax}(\beta z)}[z] - z_y`, never falls, and bisection finds its zero.

    Args:
        logits: `(N, C)`, of examples that the model was not trained on.
        labels: `(N,)` int64; -100 does not count.

    Returns:
        T, between 1 / `LARGEST` and `LARGEST`: above 1 for an overconfident model.

    Raises:
        ConfigError: No example has a label.
    """
    known = labels != IGNORE
    z, y = logits[known].double(), labels[known]
    if not len(y):
        raise ConfigError("teacher.calibrate: there is no labelled example to fit a temperature to")
    at_label = z.gather(1, y.unsqueeze(1)).squeeze(1)
    low, high = 1 / LARGEST, LARGEST
    for _ in range(100):
        beta = math.sqrt(low * high)
        slope = float(((F.softmax(beta * z, dim=1) * z).sum(1) - at_label).sum())
        low, high = (low, beta) if slope > 0 else (beta, high)
    return 1 / math.sqrt(low * high)
