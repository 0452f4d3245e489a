"""What the report says of the loss terms' shares."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.evaluation.report import Curve, findings, load_report, read_curve, write_report
from kd_lightning.evaluation.report.pictures import shares_figure
from tests.evaluation.report.examples import model, models, report_of


def shared(gradient: dict[str, list[float]], loss: dict[str, list[float]] | None = None, **settings: Any) -> Any:
    """A report of two seeds; each term's shares at steps 0, 50, ... are those given, the second seed's the same."""
    shares = [
        {term: {50 * i: value for i, value in enumerate(values)} for term, values in (kind or {}).items()}
        for kind in (loss, gradient)
    ]
    results = models(baseline=(0.75, 0.76), distilled=(0.8, 0.81))
    curves = [Curve(seed, {10: 0.5}, {10: 1.0}, *shares) for seed in (0, 1)]
    results[2] = replace(model("distilled", [0.8, 0.81]), curves=curves)
    return report_of(results, settings=settings)


def test_shares_are_read_from_the_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,train/loss,train/share/ce,train/share/kd,train/gradient/share/ce,train/gradient/norm/ce,"
        "train/gradient/share/hint/1\n0,,,,0.25,3.0,0.75\n9,1.0,0.1,0.9,,,\n0,,,,0.2,,0.8\n4,,0.3,,,,\n"
    )
    curve = read_curve(path, seed=1, score_key="val/accuracy")
    assert curve.loss == {9: 1.0}
    assert curve.loss_share == {"ce": {4: 0.3, 9: 0.1}, "kd": {9: 0.9}}
    assert curve.gradient_share == {"ce": {0: 0.2}, "hint/1": {0: 0.8}}


def test_shares_are_in_the_document_and_drawn(tmp_path: Path) -> None:
    report = shared({"ce": [0.5, 0.75], "kd": [0.5, 0.25]}, {"ce": [0.9, 0.8], "kd": [0.1, 0.2]})
    curve = report["models"]["distilled"]["curves"][1]
    assert curve["gradient_share"] == {
        "ce": {"steps": [0, 50], "values": [0.5, 0.75]},
        "kd": {"steps": [0, 50], "values": [0.5, 0.25]},
    }
    figure = shares_figure(report)
    assert figure is not None
    gradient, loss = figure.axes
    assert gradient.get_ylabel() == "share of the gradient, %"
    assert loss.get_ylabel() == "share of the weighted loss, %"
    for axes, expected in ((gradient, {"ce": [50, 75], "kd": [50, 25]}), (loss, {"ce": [90, 80], "kd": [10, 20]})):
        assert axes.get_xlabel() == "optimizer steps"
        assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == expected
        assert all(list(line.get_xdata()) == [0, 50] for line in axes.lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ce", "kd"]
    write_report(report, tmp_path)
    assert (tmp_path / "shares.png").stat().st_size > 10_000
    assert "](shares.png)" in (tmp_path / "report.md").read_text()


def test_a_line_is_the_mean_over_the_seeds() -> None:
    report = shared({"ce": [0.4], "kd": [0.6]})
    report["models"]["distilled"]["curves"][1]["gradient_share"]["ce"]["values"] = [0.2]
    figure = shares_figure(report)
    assert figure is not None
    (axes,) = figure.axes  # nothing is known of the loss's shares
    assert list(axes.lines[0].get_ydata()) == pytest.approx([30])


def test_no_shares_no_picture(single: dict[str, Any], tmp_path: Path) -> None:
    assert shares_figure(single) is None
    for entry in single["models"].values():  # a report from before there were shares
        for curve in entry["curves"]:
            del curve["loss_share"], curve["gradient_share"]
    (tmp_path / "report.json").write_text(json.dumps(single))
    write_report(load_report(tmp_path), tmp_path)
    assert not (tmp_path / "shares.png").exists()
    assert findings(single) == [warning for warning in single["warnings"] if "gradient" not in warning]


def of_shares(report: dict[str, Any]) -> list[str]:
    return [warning for warning in findings(report) if "of the gradient" in warning]


def test_warns_of_a_term_under_one_percent() -> None:
    report = shared({"ce": [0.994, 0.998], "kd": [0.006, 0.002]})  # on average 0.4%
    assert of_shares(report) == [
        "kd is 0.4% of the gradient (ce is 99.6%): the student learns next to nothing from it. "
        "If this is not intended, raise distillation.weights.kd, which alpha sets in most strategies, or set "
        "balance=unit_initial."
    ]
    assert not of_shares(shared({"ce": [0.985, 0.993], "kd": [0.015, 0.007]}))  # 1.1%


def test_one_term_over_99_percent_is_all_others_under_one() -> None:
    (first, second) = of_shares(shared({"ce": [0.002], "hint": [0.003], "kd": [0.995]}, balance="unit_initial"))
    assert first.startswith("ce is 0.2% of the gradient (kd is 99.5%)")
    assert first.endswith(
        "raise distillation.weights.ce, which alpha sets in most strategies, or set balance=gradnorm."
    )
    assert second.startswith("hint is 0.3%")
    assert second.endswith("raise distillation.weights.hint or set balance=gradnorm.")


def test_what_is_not_finite_is_left_out() -> None:
    report = shared({"ce": [0.5, math.nan], "kd": [0.5, math.nan]})
    assert report["models"]["distilled"]["curves"][0]["gradient_share"]["ce"]["values"] == [0.5, None]
    assert not of_shares(report)
    figure = shares_figure(report)
    assert figure is not None
    assert list(figure.axes[0].lines[0].get_xdata()) == [0]


def test_a_log_that_a_kill_left_empty_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").touch()
    assert read_curve(tmp_path / "metrics.csv", seed=0, score_key="val/accuracy") == Curve(0, {}, {})
