"""Builds the report document, with warnings about suspicious results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_lightning.evaluation.report.results import (
    MODEL_NAMES,
    Curve,
    DataSummary,
    ModelResult,
    monitor,
    role,
    score_title,
    sign,
)

SCHEMA_VERSION = 2
"""Raised when a key of the report is removed or changes its meaning, not for new keys."""

SELECTION = (
    "Checkpoints were selected by {score} on the validation split. "
    "The test split was read once, after training had ended."
)


def build_report(
    models: Sequence[ModelResult],
    *,
    run: str,
    task: str,
    seeds: Sequence[int],
    command: str,
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    data: DataSummary,
    stages_seconds: Mapping[str, float],
    selection: str | None = None,
) -> dict[str, Any]:
    """Assemble the report, schema version 2 (docs/report_schema.md).

    Args:
        models: The results; without models that were not trained.
        run: The run's folder or name.
        task: A short description of the prediction, for the heading.
        seeds: The seeds, in the order of each model's lists.
        command: The command line that reproduces the run.
        environment: What `measure.environment` returns.
        settings: Temperature, alpha, steps, learning rate and other settings that define the run.
        data: The data.
        stages_seconds: Wall time by stage.
        selection: How checkpoints were selected, if not by `data.score` on validation.

    Returns:
        Plain JSON data; NaN and infinities become None.

    Raises:
        ValueError: If a model occurs twice, is unknown, or has neither one result nor one per seed.
    """
    by_name = _by_name(models, seeds)
    n_test = data.splits["test"]
    shares = [name for name, spec in data.specs.items() if spec.share]
    entries = {name: _model_entry(result, shares, n_test) for name, result in by_name.items()}
    direction = 1 if data.specs[data.monitor].mode == "max" else -1
    scores = {name: [float(test[data.monitor]) for test in result.test] for name, result in by_name.items()}
    ratios = {name: _ratios(scores, name, direction) for name in ("baseline_initialised", "distilled", "finetuned")}
    for name, ratio in ratios.items():
        if name in entries:
            entries[name]["distillation_ratio"] = ratio
    errors = [entry["test"][data.monitor].get("standard_error") for entry in entries.values()]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "task": task,
        "seeds": list(seeds),
        "command": command,
        "models": entries,
        "distillation_ratio": ratios["distilled"],
        "difference": _difference(by_name, scores, n_test, data.monitor in shares),
        "data": {
            **{key: value for key, value in vars(data).items() if key != "specs"},
            "n_test": n_test,
            "standard_error": max((error for error in errors if error is not None), default=None),
        },
        "scores": {name: asdict(spec) for name, spec in data.specs.items()},
        "selection": selection or SELECTION.format(score=data.specs[data.monitor].title),
        "settings": dict(settings),
        "stages": dict(stages_seconds),
        "environment": dict(environment),
    }
    plain: dict[str, Any] = to_plain(report)
    plain["warnings"] = check(plain)
    return plain


def check(report: Mapping[str, Any]) -> list[str]:
    """Return warnings about a report.

    Args:
        report: The document `build_report` returns.

    Returns:
        One sentence per finding: a teacher or student no better than chance, a teacher no better than the
        baseline, seeds without a ratio, a distilled student below the baseline, a difference within the noise, a loss
        term that hardly counts, a single seed.
    """
    main, better = score_title(report), sign(report, monitor(report))
    scores = {name: entry["test"][monitor(report)]["mean"] for name, entry in report["models"].items()}
    scores = {name: value for name, value in scores.items() if value is not None}
    titles = {name: entry["title"] for name, entry in report["models"].items()}
    chance = report["data"]["chance_score"]
    warnings = [
        f"{titles[name]}: {main} {value:.3f} is no better than that of the best constant prediction ({chance:.3f})."
        + (" Do not distill from this teacher." if name == "teacher" else "")
        for name, value in scores.items()
        if chance is not None and better * value <= better * chance
    ]
    ratios = report["distillation_ratio"]["values"]
    teacher, baseline, distilled = (scores.get(name) for name in ("teacher", "baseline", "distilled"))
    if teacher is not None and baseline is not None and better * teacher <= better * baseline:
        warnings.append(
            f"The teacher ({teacher:.3f}) is no better than the student from labels ({baseline:.3f}): "
            "there is no gap to close and the distillation ratio is meaningless."
        )
    elif undefined := ratios.count(None):
        warnings.append(
            f"The distillation ratio is undefined for {undefined} of {len(ratios)} seeds, "
            "where the teacher was no better than the student from labels; its mean excludes them."
        )
    if baseline is not None and distilled is not None and better * distilled < better * baseline:
        warnings.append(
            f"Distillation did harm: the distilled student has {main} {distilled:.3f}, "
            f"the student from labels {baseline:.3f}."
        )
    warnings.extend(_noise_warning(report["difference"]))
    warnings.extend(_share_warnings(report))
    if len(report["seeds"]) == 1:
        warnings.append("One seed only: how much the result varies with the seed is unknown. Run with seeds=5.")
    return warnings


def to_plain(value: Any) -> Any:
    """Convert a value to strict JSON: NaN and infinities to None, tuples to lists, paths to strings.

    >>> to_plain({"a": float("nan"), "b": (1, 2.5), 3: None})
    {'a': None, 'b': [1, 2.5], '3': None}
    """
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, str | bool) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def describe(values: Iterable[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (ddof = 1) and the values; NaN if undefined.

    Values that are not finite stay in the list but do not count in mean and deviation; the deviation needs two values.

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


def _by_name(models: Sequence[ModelResult], seeds: Sequence[int]) -> dict[str, ModelResult]:
    """Order the models and check that their lists fit the seeds."""
    by_name = {model.name: model for model in models}
    if len(by_name) < len(models) or not set(map(role, by_name)) <= set(MODEL_NAMES):
        raise ValueError(f"expected each of {MODEL_NAMES} at most once, got {[model.name for model in models]}")
    for model in models:
        if len(model.test) != (1 if role(model.name) in ("teacher", "assistant") else len(seeds)):
            raise ValueError(f"{model.name}: {len(model.test)} test results for {len(seeds)} seeds")
    return dict(sorted(by_name.items(), key=lambda item: MODEL_NAMES.index(role(item[0]))))


def _model_entry(result: ModelResult, shares: Sequence[str], n_test: int) -> dict[str, Any]:
    """Return the report's entry of one model."""
    test = _describe_scores(result.test)
    for name in test.keys() & shares:
        test[name]["standard_error"] = _binomial_error(test[name]["mean"], n_test)
    return {
        "title": result.title,
        "test": test,
        "validation": _describe_scores(result.validation),
        "size": asdict(result.size) if result.size else None,
        "latency_ms": asdict(result.latency) if result.latency else None,
        "throughput": asdict(result.throughput) if result.throughput else None,
        "training_seconds": describe(result.training_seconds) if result.training_seconds else None,
        "curves": [_curve_entry(curve) for curve in result.curves],
    }


def _describe_scores(per_seed: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Turn one dict of scores per seed into one description per score."""
    names = dict.fromkeys(name for scores in per_seed for name in scores)
    return {name: describe(scores.get(name, math.nan) for scores in per_seed) for name in names}


def _curve_entry(curve: Curve) -> dict[str, Any]:
    """Write a curve as lists, since JSON keys cannot be numbers."""
    return {
        "seed": curve.seed,
        "validation_score": _series(curve.score),
        "training_loss": _series(curve.loss),
        "loss_share": {term: _series(values) for term, values in curve.loss_share.items()},
        "gradient_share": {term: _series(values) for term, values in curve.gradient_share.items()},
    }


def _series(values: Mapping[int, float]) -> dict[str, list[Any]]:
    return {"steps": list(values), "values": list(values.values())}


def _ratios(scores: Mapping[str, list[float]], name: str, direction: int) -> dict[str, Any]:
    """Return the distillation ratio of a student, each seed against the baseline of the same seed."""
    from kd_lightning.tasks.metrics import distillation_ratio

    if not {"teacher", "baseline", name} <= set(scores):
        return {**describe([]), "of_means": math.nan}
    (teacher, *_), baseline, student = ([direction * x for x in scores[own]] for own in ("teacher", "baseline", name))
    per_seed = [distillation_ratio(teacher, *pair) for pair in zip(baseline, student, strict=True)]
    of_means = distillation_ratio(teacher, statistics.fmean(baseline), statistics.fmean(student))
    return {**describe(per_seed), "of_means": of_means}


def _difference(
    models: Mapping[str, ModelResult], scores: Mapping[str, list[float]], n_test: int, share: bool
) -> dict[str, Any] | None:
    """Return distilled minus baseline, with the standard error of the difference for accuracies.

    Its variance is that of sampling test examples plus that of sampling seeds. The first is computed example by example
    if both models' predictions are known (paired), otherwise as for two independent test sets, which overstates it.
    """
    if not {"baseline", "distilled"} <= set(models):
        return None
    baseline, distilled = models["baseline"], models["distilled"]
    per_seed = [b - a for a, b in zip(scores["baseline"], scores["distilled"], strict=True)]
    described = describe(per_seed)
    paired = bool(baseline.correct) and bool(distilled.correct)
    if not share:
        return {**described, "standard_error": math.nan, "paired": False}
    if paired:
        shares = [
            [statistics.fmean(correct) for correct in zip(*model.correct, strict=True)]
            for model in (baseline, distilled)
        ]
        gains = [b - a for a, b in zip(*shares, strict=True)]
        variance = statistics.variance(gains) / len(gains)
    else:
        variance = sum(
            _binomial_error(statistics.fmean(scores[name]), n_test) ** 2 for name in ("baseline", "distilled")
        )
    if len(per_seed) > 1:
        variance += described["std"] ** 2 / len(per_seed)
    return {**described, "standard_error": math.sqrt(variance), "paired": paired}


def _binomial_error(accuracy: float, n: int) -> float:
    """Return the standard error of an accuracy measured on n examples."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def _noise_warning(difference: Mapping[str, Any] | None) -> list[str]:
    """Warn when distilled and baseline differ by less than twice the standard error of their difference."""
    if difference is None or difference["mean"] is None or difference["standard_error"] is None:
        return []
    mean, error = difference["mean"], difference["standard_error"]
    if abs(mean) >= 2 * error:
        return []
    return [
        f"The difference between distilled student and student from labels ({mean:+.3f}) is smaller than twice its "
        f"standard error ({error:.3f}): not distinguishable from noise on this test set."
    ]


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
