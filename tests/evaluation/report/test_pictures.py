from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_lightning.evaluation.report import Curve, read_curve
from kd_lightning.evaluation.report.pictures import curves_figure, mean_curve, tradeoff_figure
from kd_lightning.evaluation.report.style import spread_out
from kd_lightning.runtime.errors import DataError
from tests.evaluation.report.examples import TITLES


def test_reads_lightnings_sparse_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,train/loss,val/accuracy\n0,9,0.7,\n0,9,,0.6\n1,19,0.5,\n1,19,,0.7\n1,19,,0.71\n0,4,0.9,\n"
    )
    read = read_curve(path, seed=3, score_key="val/accuracy")
    assert read == Curve(seed=3, score={9: 0.6, 19: 0.71}, loss={4: 0.9, 9: 0.7, 19: 0.5})
    assert list(read.loss) == [4, 9, 19]


def test_reads_what_lightning_writes(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name=None, version="")
    logger.log_metrics({"train/loss_step": 0.9}, step=1)
    logger.log_metrics({"val/accuracy": 0.5}, step=2)
    logger.save()
    assert read_curve(tmp_path / "metrics.csv", seed=0, score_key="val/accuracy") == Curve(0, {2: 0.5}, {1: 0.9})


def test_damaged_rows_are_skipped_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/accuracy\n1,0.5\n2,0.6x3,0.7\n,0.8\n4,0.9\n5")
    assert read_curve(path, seed=0, score_key="val/accuracy").score == {1: 0.5, 4: 0.9}
    assert caplog.text.count("skipped a damaged row") == 2


def test_curve_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_curve(tmp_path / "metrics.csv", seed=0, score_key="val/accuracy")
    with (tmp_path / "other.csv").open("w", newline="") as file:
        csv.writer(file).writerow(["a", "b"])
    with pytest.raises(DataError, match="no column 'step'"):
        read_curve(tmp_path / "other.csv", seed=0, score_key="val/accuracy")


def test_mean_curve_over_the_steps_all_seeds_have() -> None:
    curves = [
        {"validation_score": {"steps": [1, 2, 3], "values": [0.1, 0.2, 0.3]}},
        {"validation_score": {"steps": [1, 2, 3, 4], "values": [0.3, None, 0.5, 0.6]}},
    ]
    steps, means, deviations = mean_curve(curves)
    assert steps == [1, 3]
    assert means == pytest.approx([0.2, 0.4])
    assert deviations == pytest.approx([np.std([0.1, 0.3], ddof=1)] * 2)


def test_curves_picture(everything: dict[str, Any]) -> None:
    figure = curves_figure(everything)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xlabel() == "optimizer steps"
    assert axes.get_ylabel() == "validation accuracy"
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == set(TITLES.values())
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        name: line.get_color() for name, line in lines.items()
    }
    assert lines["teacher"].get_linestyle() == "--"
    assert list(lines["teacher"].get_ydata()) == pytest.approx([0.856, 0.856])
    assert len(axes.collections) == 4  # a band for each student
    finetuned = list(lines["distilled, then fine-tuned"].get_xdata())
    assert finetuned[0] == 1100  # after the 1000 steps of distillation


def test_tradeoff_picture(five: dict[str, Any], single: dict[str, Any]) -> None:
    figure = tradeoff_figure(five)
    assert figure is not None
    sizes, latencies = figure.axes
    assert "parameters" in sizes.get_xlabel()
    assert "ms" in latencies.get_xlabel()
    assert sizes.get_ylabel() == "test accuracy"
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert {text.get_text() for text in axes.texts} == {TITLES[name] for name in five["models"]}
        assert len(axes.collections) == 2  # error bars of the two students
    plain = tradeoff_figure(single)
    assert plain is not None
    assert not plain.axes[0].collections


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    placed = spread_out([0.82, 0.5, 0.821, 0.83], gap=0.02)
    order = sorted(range(4), key=lambda i: placed[i])
    assert order == [1, 0, 2, 3]
    assert all(placed[b] - placed[a] >= 0.02 - 1e-9 for a, b in pairwise(order))
    assert placed[1] == 0.5
    assert np.mean([placed[i] for i in (0, 2, 3)]) == pytest.approx(np.mean([0.82, 0.821, 0.83]))
