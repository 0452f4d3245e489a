"""The page of a run: everything in one file, what it shows, and that nothing in it is run or loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from kd_lightning.evaluation.report import PAGE, build_report, write_report
from kd_lightning.evaluation.report.build import to_plain
from kd_lightning.evaluation.report.page import run_page
from kd_lightning.evaluation.report.pictures import calibration_figure
from kd_lightning.evaluation.report.table import comparison_rows
from kd_lightning.tasks import Classification
from tests.evaluation.report.examples import FIVE, models, report_of
from tests.evaluation.report.test_hostile import drawn_as_text, named, plain
from tests.evaluation.report.test_sweep import Page
from tests.names import HOSTILE


def detailed(report: dict[str, Any], name: str = "neg", text: str = "a text", **example: Any) -> dict[str, Any]:
    """The report with details of two classes: the student is right three times in four, labels alone twice."""
    labels, index = torch.tensor([0, 0, 1, 1]), torch.arange(4)
    predicted = {"teacher": [0, 0, 1, 1], "baseline": [0, 0, 0, 0], "distilled": [0, 1, 1, 1]}
    logits = {one: 3 * torch.eye(2)[torch.tensor(classes)] for one, classes in predicted.items()}
    watched = {one: Classification(2).details()[""] for one in logits}
    for one, details in watched.items():
        taught = None if one == "teacher" else logits["teacher"]
        details.update(logits[one], taught, {"labels": labels, "index": index})
    apart = [{**one, "text": text, **example} for one in watched["distilled"].examples()]
    part = {
        "name": "", "class_names": [name, "pos"], "apart": apart,
        "models": {one: details.compute() for one, details in watched.items()},
    }  # fmt: skip
    return {**report, "details": {"seed": 0, "student": "distilled", "parts": [part]}}


def test_the_page_has_the_comparison_the_gains_and_the_confusions(five: dict[str, Any]) -> None:
    page = Page(run_page(detailed(five), [("curves", b"png")]))
    for row in comparison_rows(five)[1:]:
        assert row in page.rows
    assert ["teacher", "0.846 ± 0.008", "+0.087 ± 0.013", "–"] in page.rows
    # F1 of neg: 2 x 2 / (2 + 4) from labels, 2 x 1 / (2 + 1) distilled; of pos 0 and 2 x 2 / (2 + 3)
    assert ["neg", "2", "1.000", "0.667", "0.667", "+0.000"] in page.rows
    assert ["pos", "2", "1.000", "0.000", "0.800", "+0.800"] in page.rows
    assert ["neg", "1", "1"] in page.rows, "the distilled student's confusions"
    assert ["pos", "0", "2"] in page.rows


def test_the_page_shows_where_student_and_teacher_differ(five: dict[str, Any]) -> None:
    text = run_page(detailed(five, text="the text of it", png="AAAA"), [])
    assert text.count("the text of it") == 1, "of the four one is predicted otherwise"
    assert "teacher: neg 0.95, pos 0.05; student: pos 0.95, neg 0.05; distance 0.905 (example 1)" in text
    assert 'src="data:image/png;base64,AAAA"' in text


def test_what_is_no_number_is_counted_against_the_student(five: dict[str, Any]) -> None:
    watched = {one: Classification(2).details()[""] for one in ("teacher", "distilled")}
    taught = 3 * torch.eye(2)[torch.tensor([0, 0, 1, 1])]
    own = taught.clone()
    own[3, 0] = torch.nan
    rows = {"labels": torch.tensor([0, 0, 1, 1]), "index": torch.arange(4)}
    watched["teacher"].update(taught, None, rows)
    watched["distilled"].update(own, taught, rows)
    part = {
        "name": "", "class_names": ["neg", "pos"], "apart": watched["distilled"].examples(),
        "models": {one: details.compute() for one, details in watched.items()},
    }  # fmt: skip
    report = {**five, "details": to_plain({"seed": 0, "student": "distilled", "parts": [part]})}
    text = run_page(report, [])
    # of pos 2 x 1 / (2 + 1)
    assert ["pos", "2", "1.000", "0.667", "–"] in [[*row[:4], row[-1]] for row in Page(text).rows if row[0] == "pos"]
    assert f"{five['models']['distilled']['title']}: 1 of 4. They count against its F1" in text
    assert "Label <b>pos</b>; teacher: pos 0.95, neg 0.05; student: –; distance – (example 3)" in text
    figure = calibration_figure(report)
    assert figure is not None
    assert [one.get_label() for one in figure.axes[0].lines][-1].endswith("(1 NaN left out)")


def test_nothing_is_loaded_from_elsewhere(five: dict[str, Any]) -> None:
    text = run_page(detailed(five), [("curves", b"png")])
    page = Page(text)
    assert page.loads
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_and_texts_of_others_are_shown_and_not_run(name: str) -> None:
    usual = Page(run_page(detailed(named("a")), []))
    page = run_page(detailed(named(name), name, name or " "), [])
    assert plain(page)
    page.encode()
    assert Page(page).tags == usual.tags


def test_a_page_is_written_beside_the_report_with_the_calibration(five: dict[str, Any], tmp_path: Any) -> None:
    write_report(detailed(five), tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "calibration.png" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "calibration.png").is_file()


def test_the_picture_of_calibration_has_a_line_a_model(five: dict[str, Any]) -> None:
    assert calibration_figure(five) is None
    report = detailed(five)
    report["models"]["teacher"]["title"] = "$\\frac$ teacher"
    figure = calibration_figure(report)
    assert figure is not None
    drawn_as_text(figure)
    _, teacher, baseline, distilled = figure.axes[0].lines
    assert teacher.get_ydata().tolist() == [1.0]
    assert baseline.get_ydata().tolist() == [0.5]
    assert distilled.get_ydata().tolist() == [0.75]


def test_a_report_of_an_earlier_version_has_a_page_without_details() -> None:
    page = run_page(report_of(models(**FIVE)), [])
    assert "Confusions" not in page
    assert "How to reproduce it" in page


def test_details_go_into_the_document_as_they_are(five: dict[str, Any]) -> None:
    made = build_report(
        models(**FIVE), run="r", task="t", seeds=range(5), command="c", environment={}, settings={},
        data=report_data(), stages_seconds={}, details={"parts": [], "seed": 3, "student": "distilled"},
    )  # fmt: skip
    assert made["details"] == {"parts": [], "seed": 3, "student": "distilled"}
    assert "details" not in five


def report_data() -> Any:
    from kd_lightning.evaluation.report import DataSummary

    return DataSummary("d", {"train": 1, "validation": 1, "test": 10}, 0.5, "accuracy", Classification(2).specs, [])
