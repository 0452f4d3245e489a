"""What a reader must know before believing a report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.evaluation.report.differences import BASELINES, is_noise
from kd_lightning.evaluation.report.results import monitor, score_title, sign

BADLY_CALIBRATED = 0.1
"""A teacher's calibration error from which it is worth naming as a cause."""


def findings(report: Mapping[str, Any]) -> list[str]:
    """Return warnings about a report, one sentence or two a finding.

    A teacher or student no better than chance, a teacher no better than a baseline, seeds without a ratio, a distilled
    student that is worse than a baseline or not distinguishable from it, a loss term that hardly counts, a single seed.

    Args:
        report: The document `build_report` returns.
    """
    warnings = [*_chance(report), *_gap(report)]
    for baseline in BASELINES:
        warnings += _against(report, baseline)
    warnings += _share_warnings(report)
    if len(report["seeds"]) == 1:
        warnings.append("One seed only: nothing here tells how much the result varies with the seed. Run with seeds=5.")
    return warnings


def _means(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the score that is compared, by model, where there is one."""
    found = {name: entry["test"][monitor(report)]["mean"] for name, entry in report["models"].items()}
    return {name: value for name, value in found.items() if value is not None}


def _chance(report: Mapping[str, Any]) -> list[str]:
    better, chance = sign(report, monitor(report)), report["data"]["chance_score"]
    return [
        f"{report['models'][name]['title']}: {score_title(report)} {value:.3f} is no better than that of the best "
        f"constant prediction ({chance:.3f})." + (" Do not distill from this teacher." if name == "teacher" else "")
        for name, value in _means(report).items()
        if name != "untrained" and chance is not None and better * value <= better * chance
    ]


def _gap(report: Mapping[str, Any]) -> list[str]:
    """Warn where the gap between teacher and baseline is none, or within the noise."""
    means, better = _means(report), sign(report, monitor(report))
    if not {"teacher", "baseline"} <= means.keys():
        return []
    teacher, baseline, values = means["teacher"], means["baseline"], report["distillation_ratio"]["values"]
    title = report["models"]["baseline"]["title"]
    if better * teacher <= better * baseline:
        return [
            f"The teacher ({teacher:.3f}) is no better than the {title} ({baseline:.3f}): "
            "there is no gap to close and the distillation ratio is meaningless."
        ]
    if is_noise(gap := report["differences"]["teacher"]["baseline"]):
        return [
            f"The gap between teacher and {title} ({gap['mean']:+.3f}) is smaller than twice its standard error "
            f"({gap['standard_error']:.3f}): it may be noise, and no share of it is given."
        ]
    if undefined := values.count(None):
        return [
            f"The distillation ratio is undefined for {undefined} of {len(values)} seeds, "
            f"where the teacher was no better than the {title}; its mean excludes them."
        ]
    return []


def _against(report: Mapping[str, Any], baseline: str) -> list[str]:
    """Warn where the distilled student is worse than a baseline, or not distinguishable from it."""
    difference = report["differences"].get("distilled", {}).get(baseline)
    if difference is None or difference["mean"] is None:
        return []
    mean, title = difference["mean"], report["models"][baseline]["title"]
    if is_noise(difference):
        return [
            f"The difference between distilled student and {title} ({mean:+.3f}) is smaller than twice its "
            f"standard error ({difference['standard_error']:.3f}): not distinguishable from noise on this test set."
        ]
    if sign(report, monitor(report)) * mean >= 0:
        return []
    means = _means(report)
    return [
        f"Distillation did harm: the distilled student has {score_title(report)} {means['distilled']:.3f}, "
        f"the {title} {means[baseline]:.3f}.{_cause(report)}"
    ]


def _cause(report: Mapping[str, Any]) -> str:
    """Return the likeliest cause of a distillation that did not help, and what to change."""
    models, title = report["models"], score_title(report)
    teacher = models.get("teacher", {"curves": [], "validation": {}})
    if _still_improving(report, models["distilled"]["curves"]):
        return (
            f" Its validation {title} was still improving at the end: train for more steps (trainer.max_steps, now "
            f"{report['settings'].get('steps')})."
        )
    if _still_improving(report, teacher["curves"]):
        return (
            f" The teacher's validation {title} was still improving at the end: train it for longer "
            "(teacher.trainer.max_epochs)."
        )
    error = teacher["validation"].get(report["data"].get("calibration"), {}).get("mean")
    if error is not None and error > BADLY_CALIBRATED:
        return (
            f" The teacher's probabilities are wrong by {error:.2f} on average (calibration error): set "
            "teacher.calibrate=true."
        )
    return ""


def _still_improving(report: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether most trainings were best at their last look at validation."""
    better = sign(report, monitor(report))
    looks = [[better * value for value in curve["validation_score"]["values"] if value is not None] for curve in curves]
    at_end = [len(values) > 2 and values[-1] > max(values[:-1]) for values in looks]
    return bool(at_end) and 2 * sum(at_end) > len(at_end)


def _share_warnings(report: Mapping[str, Any]) -> list[str]:
    """Warn about each term with under 1% of the distillation's gradient."""
    curves = report["models"].get("distilled", {"curves": []})["curves"]
    values: dict[str, list[float]] = {}
    for curve in curves:
        for term, series in curve.get("gradient_share", {}).items():
            values.setdefault(term, []).extend(value for value in series["values"] if value is not None)
    shares = {term: statistics.fmean(listed) for term, listed in values.items() if listed}
    balance = {"fixed": " or set balance=unit_initial", "unit_initial": " or set balance=gradnorm"}
    other = balance.get(report["settings"].get("balance", "fixed"), "")
    warnings = []
    for term, share in shares.items():
        if share < 0.01:
            task, _, own = term.rpartition("/")
            weight = f"tasks.{task}.weight" if task else f"distillation.weights.{term}"
            remedy = f"raise {weight}" + (", which alpha sets in most strategies," if own in ("ce", "kd") else "")
            most = max(shares, key=lambda name: shares[name])
            warnings.append(
                f"{term} is {100 * share:.2g}% of the gradient ({most} is {100 * shares[most]:.3g}%): the student "
                f"learns next to nothing from it. If this is not intended, {remedy}{other}."
            )
    return warnings
