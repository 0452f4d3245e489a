"""Builds the report document, with warnings about suspicious results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_lightning.evaluation.report.differences import binomial_error, describe, differences, mean_error, ratios
from kd_lightning.evaluation.report.findings import findings
from kd_lightning.evaluation.report.results import (
    MODEL_NAMES,
    Curve,
    DataSummary,
    ModelResult,
    role,
)

if TYPE_CHECKING:
    from kd_lightning.tasks import ScoreSpec

SCHEMA_VERSION = 3
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
    notes: Sequence[str] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Assemble the report, schema version 3 (docs/report_schema.md).

    Args:
        models: The results; without models that were not trained.
        run: The run's folder or name.
        task: A short description of the prediction, for the heading.
        seeds: The seeds, in the order of each model's lists.
        command: The command line that reproduces the run.
        environment: What `profiling.environment` returns.
        settings: Temperature, alpha, steps, learning rate and other settings that define the run.
        data: The data.
        stages_seconds: Wall time by stage.
        selection: How checkpoints were selected, if not by `data.monitor` on validation.
        notes: What was found before the comparison; the first of the warnings.
        samples: How models go on with some prompts, as `evaluation.generated.samples` returns it.
        details: What single models confuse, how they are calibrated and where student and teacher differ most.

    Returns:
        Plain JSON data; NaN and infinities become None.

    Raises:
        ValueError: If a model occurs twice, is unknown, or has neither one result nor one per seed.
    """
    by_name = _by_name(models, seeds)
    n_test = data.splits["test"]
    entries = {name: _model_entry(result, data.specs, n_test) for name, result in by_name.items()}
    direction = 1 if data.specs[data.monitor].mode == "max" else -1
    scores = {name: [float(test[data.monitor]) for test in result.test] for name, result in by_name.items()}
    of_gap = {
        name: ratios(scores, name, "baseline", direction) for name in ("baseline_initialised", "distilled", "finetuned")
    }
    for name in entries.keys() & of_gap:
        entries[name]["distillation_ratio"] = of_gap[name]
    errors = [entry["test"][data.monitor].get("standard_error") for entry in entries.values()]
    units = [len(sums[data.monitor].totals) for result in models for sums in result.units if data.monitor in sums]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "task": task,
        "seeds": list(seeds),
        "command": command,
        "models": entries,
        "distillation_ratio": of_gap["distilled"],
        "distillation_ratio_same_start": ratios(scores, "distilled", "baseline_initialised", direction),
        "differences": differences(by_name, data.monitor, n_test, data.specs[data.monitor].share),
        "data": {
            **{key: value for key, value in vars(data).items() if key != "specs"},
            "n_test": n_test,
            "units": max(units, default=n_test),
            "standard_error": max((error for error in errors if error is not None), default=None),
        },
        "scores": {name: asdict(spec) for name, spec in data.specs.items()},
        "selection": selection or SELECTION.format(score=data.specs[data.monitor].title),
        "settings": dict(settings),
        "stages": dict(stages_seconds),
        "environment": dict(environment),
        **({"samples": samples} if samples else {}),
        **({"details": details} if details else {}),
    }
    plain: dict[str, Any] = to_plain(report)
    plain["warnings"] = [*notes, *findings(plain)]
    return plain


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


def _by_name(models: Sequence[ModelResult], seeds: Sequence[int]) -> dict[str, ModelResult]:
    """Order the models and check that their lists fit the seeds."""
    by_name = {model.name: model for model in models}
    if len(by_name) < len(models) or not set(map(role, by_name)) <= set(MODEL_NAMES):
        raise ValueError(f"expected each of {MODEL_NAMES} at most once, got {[model.name for model in models]}")
    for model in models:
        if len(model.test) != (1 if role(model.name) in ("teacher", "assistant", "untrained") else len(seeds)):
            raise ValueError(f"{model.name}: {len(model.test)} test results for {len(seeds)} seeds")
    return dict(sorted(by_name.items(), key=lambda item: MODEL_NAMES.index(role(item[0]))))


def _model_entry(result: ModelResult, specs: Mapping[str, ScoreSpec], n_test: int) -> dict[str, Any]:
    """Return the report's entry of one model."""
    test = _describe_scores(result.test)
    for name in test.keys() & specs.keys():
        error = mean_error(result, specs[name].exp_of or name)
        if specs[name].share:
            test[name]["standard_error"] = binomial_error(test[name]["mean"], n_test)
        elif error is not None:
            test[name]["standard_error"] = error * test[name]["mean"] if specs[name].exp_of else error
    return {
        "title": result.title,
        "test": test,
        "validation": _describe_scores(result.validation),
        "size": asdict(result.size) if result.size else None,
        "latency_ms": asdict(result.latency) if result.latency else None,
        "throughput": asdict(result.throughput) if result.throughput else None,
        **({"generation": asdict(result.generation)} if result.generation else {}),
        **({"draft": asdict(result.draft)} if result.draft else {}),
        "training_seconds": describe(result.training_seconds) if result.training_seconds else None,
        "outputs_seconds": asdict(result.outputs_seconds) if result.outputs_seconds else None,
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
