from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_lightning.evaluation.clusters import clustered_error, residuals
from kd_lightning.evaluation.profiling import environment
from kd_lightning.evaluation.report import Curve, DataSummary, findings, report_markdown, summary, write_report
from kd_lightning.evaluation.report.differences import distillation_ratio
from kd_lightning.evaluation.report.pictures import curves_figure, tradeoff_figure
from kd_lightning.evaluation.report.table import markdown_table
from kd_lightning.tasks import CausalLanguageModeling, ScoreSpec
from kd_lightning.tasks.scores import UnitSums
from tests import ROOT
from tests.evaluation.report.examples import FIVE, model, models, printed, report_of, scores


def test_schema_of_version_one(five: dict[str, Any]) -> None:
    assert five["schema_version"] == 3
    assert five["seeds"] == [0, 1, 2, 3, 4]
    assert list(five["models"]) == ["teacher", "baseline", "distilled"]
    for entry in five["models"].values():
        for split in ("test", "validation"):
            assert {"accuracy", "macro_f1", "ece", "cross_entropy"} <= set(entry[split])
            for described in entry[split].values():
                assert {"mean", "std", "values"} <= set(described)
        assert set(entry["size"]) == {"parameters", "parameters_without_embeddings", "bytes"}
        assert all(isinstance(entry["latency_ms"][key], float) for key in ("p50", "p95"))
        assert isinstance(entry["throughput"]["examples_per_second"], float)
        assert isinstance(entry["training_seconds"]["mean"], float)
    assert {"mean", "std", "values"} <= set(five["distillation_ratio"])
    assert isinstance(five["command"], str)
    assert five["environment"]["python"] == "3.11.2"
    assert five["settings"] == {"temperature": 2.0, "alpha": 0.9, "folder": "runs"}
    assert five["stages"]["distill"] == 88.0
    assert five["data"]["n_test"] == 2000
    assert five["data"]["splits"]["train"] == 8000
    assert five["warnings"] == []


def test_document_survives_strict_json(everything: dict[str, Any]) -> None:
    text = json.dumps(everything, allow_nan=False)
    assert json.loads(text) == everything


def test_statistics_are_numpys(five: dict[str, Any]) -> None:
    baseline, distilled = np.array(FIVE["baseline"]), np.array(FIVE["distilled"])
    described = five["models"]["distilled"]["test"]["accuracy"]
    assert described["mean"] == pytest.approx(distilled.mean())
    assert described["std"] == pytest.approx(distilled.std(ddof=1))
    assert described["values"] == list(FIVE["distilled"])
    assert described["standard_error"] == pytest.approx(math.sqrt(distilled.mean() * (1 - distilled.mean()) / 2000))
    assert five["data"]["standard_error"] == pytest.approx(math.sqrt(baseline.mean() * (1 - baseline.mean()) / 2000))
    ratios = (distilled - baseline) / (0.846 - baseline)
    assert five["distillation_ratio"]["values"] == pytest.approx(list(ratios))
    assert five["distillation_ratio"]["mean"] == pytest.approx(ratios.mean())
    assert five["distillation_ratio"]["std"] == pytest.approx(ratios.std(ddof=1))
    means = (distilled.mean() - baseline.mean()) / (0.846 - baseline.mean())
    assert five["distillation_ratio"]["of_means"] == pytest.approx(means)
    p, q, gains = baseline.mean(), distilled.mean(), distilled - baseline
    variance = p * (1 - p) / 2000 + q * (1 - q) / 2000 + gains.var(ddof=1) / 5
    assert five["differences"]["distilled"]["baseline"]["mean"] == pytest.approx(gains.mean())
    assert five["differences"]["distilled"]["baseline"]["standard_error"] == pytest.approx(math.sqrt(variance))


def test_paired_difference_is_the_standard_error_of_the_mean_gain() -> None:
    generator = np.random.default_rng(0)
    right = generator.random((2, 1, 400)) < np.array([0.7, 0.8])[:, None, None]
    results = models(baseline=(right[0].mean(),), distilled=(right[1].mean(),))
    for number, own in enumerate(right[:, 0].astype(float), start=1):
        results[number] = replace(results[number], units=[{"accuracy": UnitSums(own, np.ones(400))}])
    difference = report_of(results, n_test=400)["differences"]["distilled"]["baseline"]
    gains = right[1, 0].astype(float) - right[0, 0]
    assert difference["paired"] is True
    assert difference["standard_error"] == pytest.approx(gains.std(ddof=1) / 20)


def documents(seed: int, count: int = 40) -> dict[str, UnitSums]:
    """Tokens' losses by document: those of one document are alike, and documents differ in length."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 200, count).astype(float)
    own = generator.normal(3.0, 1.0, count)  # a document's
    return {"cross_entropy": UnitSums(lengths * own + generator.normal(0, lengths**0.5), lengths)}


def test_errors_of_means_over_tokens_are_by_document() -> None:
    """The estimate is the deviation over corpora that are drawn anew; that of independent tokens is far below it."""
    drawn = [documents(seed)["cross_entropy"] for seed in range(400)]
    means = [sums.totals.sum() / sums.weights.sum() for sums in drawn]
    estimates = [clustered_error(residuals(sums)) for sums in drawn]
    assert np.mean(estimates) == pytest.approx(np.std(means), rel=0.1)
    assert 2**0.5 / np.mean([sums.weights.sum() for sums in drawn]) ** 0.5 < np.mean(estimates) / 5
    assert math.isnan(clustered_error(residuals(UnitSums(np.ones(1), np.ones(1)))))


def of_language_models() -> dict[str, Any]:
    """A report in which the distilled student is better by 0.1 nats on each token."""
    specs, results = CausalLanguageModeling(9).specs, []
    for name, gain in (("teacher", 0.5), ("baseline", 0.0), ("distilled", 0.1)):
        units = documents(0) | {"kl_to_teacher/1-16": documents(1)["cross_entropy"]}
        loss = units["cross_entropy"]
        units["cross_entropy"] = UnitSums(loss.totals - gain * loss.weights, loss.weights)
        means = {score: float(sums.totals.sum() / sums.weights.sum()) for score, sums in units.items()}
        test = {**means, "perplexity": math.exp(means["cross_entropy"])}
        results.append(replace(model(name, [0.5]), test=[test], validation=[test], units=[units]))
    data = DataSummary("text", {"test": 70}, 6.0, "cross_entropy", specs, unit="document")
    return report_of(results, data=data)


def test_language_models_are_compared_document_by_document() -> None:
    report = of_language_models()
    test = report["models"]["distilled"]["test"]
    own = clustered_error(residuals(documents(0)["cross_entropy"]))
    assert test["cross_entropy"]["standard_error"] == pytest.approx(own)
    assert test["perplexity"]["standard_error"] == pytest.approx(own * test["perplexity"]["mean"])
    assert report["data"]["units"] == 40
    difference = report["differences"]["distilled"]["baseline"]
    assert difference["mean"] == pytest.approx(-0.1)
    assert difference["paired"] is True
    assert difference["standard_error"] == pytest.approx(0.0, abs=1e-9)  # the same on each document
    assert difference["scores"]["kl_to_teacher/1-16"]["mean"] == pytest.approx(0.0)
    assert not has(report, "not distinguishable")
    text = report_markdown(report)
    assert "With 40 test documents the standard error of a score is up to" in text
    table = text.partition("## Standard errors by document")[2].partition("## ")[0]
    assert f"| {report['scores']['kl_to_teacher/1-16']['title']} |" in table
    assert "-0.1 ± " in table
    assert "Standard errors by" not in report_markdown(report_of(models()))


def test_one_seed_has_no_deviation(single: dict[str, Any]) -> None:
    assert single["models"]["distilled"]["test"]["accuracy"]["std"] is None
    assert single["distillation_ratio"]["std"] is None
    assert single["distillation_ratio"]["values"] == pytest.approx([(0.824 - 0.759) / (0.846 - 0.759)])


def test_nan_and_infinity_become_null() -> None:
    results = models()
    results[2] = replace(results[2], test=[{**scores(0.8), "ece": math.nan, "cross_entropy": math.inf}])
    test = report_of(results)["models"]["distilled"]["test"]
    assert test["ece"] == {"mean": None, "std": None, "values": [None]}
    assert test["cross_entropy"]["values"] == [None]


def test_ratio_is_null_where_the_teacher_is_no_better() -> None:
    report = report_of(models(teacher=0.755, **FIVE))
    undefined = [b >= 0.755 for b in FIVE["baseline"]]
    assert [value is None for value in report["distillation_ratio"]["values"]] == undefined
    assert report["distillation_ratio"]["mean"] == pytest.approx((0.819 - 0.752) / (0.755 - 0.752))


@pytest.mark.parametrize("names", [["teacher"], ["baseline"], ["teacher", "baseline"], ["distilled"]])
def test_reports_on_some_of_the_models(names: list[str], tmp_path: Path) -> None:
    report = report_of([model(name, [0.8]) for name in names])
    assert report["distillation_ratio"]["mean"] is None
    assert "0.800" in summary(report)
    assert "0.800" in printed(report)
    write_report(report, tmp_path)


def test_results_without_measurements_are_reported(tmp_path: Path) -> None:
    bare = {"size": None, "latency": None, "throughput": None, "training_seconds": [], "curves": [], "validation": []}
    report = report_of([replace(result, **bare) for result in models()])
    assert report["models"]["teacher"]["training_seconds"] is None
    assert curves_figure(report) is None
    assert tradeoff_figure(report) is None
    write_report(report, tmp_path)
    assert "png" not in (tmp_path / "report.md").read_text()


def test_lists_must_fit_the_seeds() -> None:
    with pytest.raises(ValueError, match="distilled: 2 test results for 1 seeds"):
        report_of([model("distilled", [0.8, 0.8])], seeds=[0])
    with pytest.raises(ValueError, match="at most once"):
        report_of([model("distilled", [0.8]), model("distilled", [0.8])])


def has(report: dict[str, Any], words: str) -> bool:
    return any(words in warning for warning in findings(report))


def test_warns_of_a_teacher_no_better_than_chance() -> None:
    assert has(report_of(models(), chance=0.9), "Do not distill from this teacher")
    assert not has(report_of(models(), chance=0.8), "Do not distill from this teacher")


def test_warns_of_a_student_no_better_than_chance() -> None:
    assert has(
        report_of(models(), chance=0.8),
        "student from labels: accuracy 0.759 is no better than that of the best constant",
    )
    assert not has(report_of(models(), chance=0.7), "is no better than that of the best constant")


def test_warns_of_a_teacher_worse_than_the_baseline() -> None:
    assert has(report_of(models(teacher=0.75)), "the distillation ratio is meaningless")
    assert not has(report_of(models()), "the distillation ratio is meaningless")


def test_warns_of_seeds_without_a_ratio() -> None:
    assert has(report_of(models(teacher=0.7635, **FIVE), n_test=200_000), "undefined for 1 of 5 seeds")
    assert not has(report_of(models(**FIVE)), "undefined")


def test_warns_of_distillation_that_harms() -> None:
    assert has(report_of(models(distilled=(0.7,))), "Distillation did harm")
    assert not has(report_of(models()), "Distillation did harm")


def test_warns_of_a_difference_within_the_noise() -> None:
    # standard error of the difference: sqrt(0.759 * 0.241 / n + 0.824 * 0.176 / n) = 0.0404 at n = 200, 0.0128 at 2000
    words = "not distinguishable from noise on this test set"
    assert has(report_of(models(), n_test=200), words)
    assert not has(report_of(models(), n_test=2000), words)


STARTED = model("baseline_initialised", [0.83])


def test_a_student_is_held_against_the_same_start_too() -> None:
    report = report_of([*models(), STARTED])
    assert report["distillation_ratio_same_start"]["mean"] == pytest.approx((0.824 - 0.83) / (0.846 - 0.83))
    assert report["differences"]["distilled"]["baseline_initialised"]["mean"] == pytest.approx(-0.006)
    assert has(report, f"distilled student and {STARTED.title} (-0.006) is smaller than twice")
    harm = f"Distillation did harm: the distilled student has accuracy 0.824, the {STARTED.title} 0.830."
    assert has(report_of([*models(), STARTED], n_test=2_000_000), harm)
    assert "Distillation did not help" in summary(report)
    assert "from the same start 0.830" in summary(report)
    assert "against the same start -0.38" in printed(report)
    helped = report_of([*models(), replace(STARTED, test=[scores(0.8)])])
    assert "75% of the gap to the teacher, 52% of what the same start leaves" in summary(helped)


def test_a_gap_within_the_noise_is_not_shared_out() -> None:
    report = report_of(models(teacher=0.83, baseline=(0.80,), distilled=(0.82,)), n_test=200)
    assert has(report, "The gap between teacher and student from labels (+0.030) is smaller than twice its standard")
    assert "may be noise" in summary(report)
    assert "not given, the gap T - S may be noise" in printed(report)
    assert report["distillation_ratio"]["mean"] == pytest.approx(2 / 3), "in the file it stays"
    assert not has(
        report_of(models(teacher=0.83, baseline=(0.80,), distilled=(0.82,)), n_test=20_000), "The gap between"
    )


def rising(*looks: float) -> Curve:
    return Curve(0, {100 * (number + 1): look for number, look in enumerate(looks)}, {})


@pytest.mark.parametrize(
    ("student", "teacher", "ece", "says"),
    [
        (rising(0.6, 0.65, 0.7), rising(0.8, 0.84, 0.846), 0.3, "for more steps (trainer.max_steps"),
        (rising(0.6, 0.7, 0.7), rising(0.8, 0.84, 0.846), 0.3, "train it for longer (teacher.trainer.max_epochs)"),
        (rising(0.6, 0.7, 0.7), rising(0.8, 0.846, 0.84), 0.3, "wrong by 0.30 on average (calibration error): set"),
        (rising(0.6, 0.7, 0.7), rising(0.8, 0.846, 0.84), 0.01, "the student from labels 0.759."),
    ],
)
def test_a_distillation_that_did_harm_names_the_likeliest_cause(
    student: Curve, teacher: Curve, ece: float, says: str
) -> None:
    above, below, distilled = models(distilled=(0.7,))
    above = replace(above, curves=[teacher], validation=[{**scores(0.846), "ece": ece}])
    report = report_of([above, below, replace(distilled, curves=[student])])
    [found] = [warning for warning in findings(report) if warning.startswith("Distillation did harm")]
    assert found.endswith(says) if says.endswith("759.") else says in found


def test_warns_of_one_seed(single: dict[str, Any], five: dict[str, Any]) -> None:
    assert has(single, "One seed only")
    assert not has(five, "One seed only")


def test_every_key_is_documented(everything: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "report_schema.md").read_text(encoding="utf-8")
    distilled = everything["models"]["distilled"]
    groups = [
        everything,
        everything["models"],
        distilled,
        distilled["test"],
        distilled["size"],
        distilled["latency_ms"],
    ]
    groups += [
        distilled["throughput"],
        everything["data"],
        everything["differences"]["distilled"]["baseline"],
        everything["distillation_ratio"],
    ]
    for key in {key for group in groups for key in group} | set(environment()):
        assert f"`{key}`" in text, key


def of_losses(teacher: float, baseline: float, distilled: float) -> dict[str, Any]:
    """A report of models that are compared by a loss."""
    specs = {"loss": ScoreSpec("loss", "min", shown="always")}
    data = DataSummary("text", {"test": 100}, 3.0, "loss", specs)
    found = [model(name, [0.5]) for name in ("teacher", "baseline", "distilled")]
    given = zip(found, (teacher, baseline, distilled), strict=True)
    return report_of(
        [replace(one, test=[{"loss": loss}], validation=[{"loss": loss}]) for one, loss in given], data=data
    )


def test_less_of_a_loss_is_better() -> None:
    good, bad = of_losses(1.0, 2.0, 1.5), of_losses(3.5, 2.0, 2.5)
    assert good["distillation_ratio"]["mean"] == pytest.approx(0.5)
    assert good["scores"]["loss"]["mode"] == "min"
    assert not any("harm" in warning or "no better" in warning for warning in good["warnings"])
    assert bad["distillation_ratio"]["mean"] is None
    assert has(bad, "The teacher (3.500) is no better than the student from labels (2.000)")
    assert has(bad, "Distillation did harm: the distilled student has loss 2.500")
    assert has(bad, "teacher: loss 3.500 is no better than that of the best constant prediction (3.000)")
    assert "Distillation closed 50% of the gap" in summary(good)
    assert "accuracy" not in summary(good) + markdown_table(good)


def test_ratio() -> None:
    assert distillation_ratio(0.9403, 0.8314, 0.9048) == pytest.approx(0.67, abs=0.005)  # neural-compressor, SST-2
    assert distillation_ratio(0.9, 0.8, 0.75) == pytest.approx(-0.5)
    assert distillation_ratio(0.9, 0.8, 0.95) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "scores", [(0.8, 0.8, 0.9), (0.7, 0.8, 0.75), (math.nan, 0.8, 0.9), (0.9, math.nan, 0.9), (0.9, 0.8, math.nan)]
)
def test_ratio_is_nan_where_it_means_nothing(scores: tuple[float, float, float]) -> None:
    assert math.isnan(distillation_ratio(*scores))
