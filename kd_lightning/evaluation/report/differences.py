"""By how much one model is better than another, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_lightning.evaluation.clusters import clustered_error, residuals
from kd_lightning.evaluation.report.results import ModelResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

BASELINES = ("baseline", "baseline_initialised")
"""What a distilled student is compared with: the same student from labels, and the same from the same start."""


def describe(values: Iterable[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (ddof = 1) and the values themselves; nan where undefined.

    Values that are not finite stay in the list and are left out of mean and deviation; the deviation needs two values.

    >>> describe([1.0, 2.0, 3.0])
    {'mean': 2.0, 'std': 1.0, 'values': [1.0, 2.0, 3.0]}
    """
    listed = [float(value) for value in values]
    finite = [value for value in listed if math.isfinite(value)]
    return {
        "mean": statistics.fmean(finite) if finite else math.nan,
        "std": statistics.stdev(finite) if len(finite) > 1 else math.nan,
        "values": listed,
    }


def binomial_error(accuracy: float, n: int) -> float:
    """Return the standard error of an accuracy measured on n examples."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def mean_error(model: ModelResult, score: str) -> float | None:
    """Return the standard error of a model's score, by units; None where these are not known."""
    found = _mean_residuals(model, score)
    return None if found is None else clustered_error(found)


def _mean_residuals(model: ModelResult, score: str) -> NDArray[np.float64] | None:
    found = [residuals(units[score]) for units in model.units if score in units and units[score].weights.any()]
    return np.mean(found, axis=0) if found else None


def differences(models: Mapping[str, ModelResult], score: str, n_test: int, share: bool) -> dict[str, dict[str, Any]]:
    """Return how much better each model is than each baseline, by model and baseline.

    Args:
        models: The results.
        score: By which they are compared.
        n_test: How many test examples there are.
        share: Whether the score is a share of examples that are right, which has a standard error.

    Returns:
        For each pair the difference of the score, and under `scores` those of others that single units are known for.
    """
    return {
        name: {
            baseline: {
                **_difference(models[name], models[baseline], score, n_test, share),
                "scores": {
                    other: _difference(models[name], models[baseline], other, n_test, share=False)
                    for other in (models[name].units or [{}])[0]
                    if other != score and other in (models[baseline].units or [{}])[0]
                },
            }
            for baseline in BASELINES
            if baseline in models and baseline != name
        }
        for name in ("teacher", "baseline_initialised", "distilled", "finetuned")
        if name in models
    }


def _difference(model: ModelResult, baseline: ModelResult, score: str, n_test: int, share: bool) -> dict[str, Any]:
    """Return a model's score minus a baseline's, with the standard error of the difference.

    Each seed is compared with the same seed of the baseline. The variance is that of sampling test examples plus that
    of sampling seeds. The first is computed unit by unit if both models' are known (paired), otherwise, for a share, as
    for two independent test sets, which overstates it.
    """
    ours, theirs = ([float(test.get(score, math.nan)) for test in one.test] for one in (model, baseline))
    per_seed = describe(b - a for a, b in zip(theirs, ours * len(theirs) if len(ours) == 1 else ours, strict=True))
    own, other = _mean_residuals(model, score), _mean_residuals(baseline, score)
    paired = own is not None and other is not None and len(own) == len(other)
    if own is not None and other is not None and paired:
        variance = clustered_error(own - other) ** 2
    elif share:
        variance = sum(binomial_error(statistics.fmean(one), n_test) ** 2 for one in (ours, theirs))
    else:
        variance = math.nan
    if len(theirs) > 1:
        variance += per_seed["std"] ** 2 / len(theirs)
    return {**per_seed, "standard_error": math.sqrt(variance), "paired": paired}


def distillation_ratio(teacher: float, baseline: float, distilled: float) -> float:
    r"""Part of the gap between student and teacher that distillation closed.

    $$ (S_{kd} - S) / (T - S) $$ for the scores of the teacher, of the student from labels and of the distilled student.
    1 is the teacher reached, 0 is no gain, negative is harm.

    Returns:
        The ratio. nan when the teacher is no better than the baseline (T <= S): there is no gap to close, and dividing
        by it would call a distilled student that got worse a success. nan too when a score is not finite.

    >>> round(distillation_ratio(teacher=0.846, baseline=0.759, distilled=0.824), 3)
    0.747
    >>> distillation_ratio(teacher=0.70, baseline=0.75, distilled=0.72)
    nan
    """
    gap = teacher - baseline
    if not gap > 0 or not math.isfinite(gap) or not math.isfinite(distilled):
        return math.nan
    return (distilled - baseline) / gap


def ratios(scores: Mapping[str, list[float]], name: str, baseline: str, direction: int) -> dict[str, Any]:
    """Return a student's share of the gap between a baseline and the teacher, seed by seed."""
    if not {"teacher", baseline, name} <= set(scores):
        return {**describe([]), "of_means": math.nan}
    (teacher, *_), below, student = ([direction * x for x in scores[own]] for own in ("teacher", baseline, name))
    per_seed = [distillation_ratio(teacher, *pair) for pair in zip(below, student, strict=True)]
    return {
        **describe(per_seed),
        "of_means": distillation_ratio(teacher, statistics.fmean(below), statistics.fmean(student)),
    }


def gap_is_noise(report: Mapping[str, Any]) -> bool:
    """Return whether the gap T - S between the teacher and the student from labels may be noise."""
    return is_noise(report["differences"].get("teacher", {}).get("baseline"))


def is_noise(difference: Mapping[str, Any] | None) -> bool:
    """Return whether a difference is below twice its standard error, if that is known."""
    if difference is None or difference["mean"] is None or difference["standard_error"] is None:
        return False
    return bool(abs(difference["mean"]) < 2 * difference["standard_error"])
