from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from kd_lightning.evaluation.profiling import Latency, Size
from kd_lightning.evaluation.report import comparison_rows, markdown_table, report_markdown, summary
from tests.evaluation.report.examples import models, printed, report_of


@pytest.mark.parametrize("name", ["single", "five", "everything"])
def test_table_shows_every_value_unbroken_at_100_columns(name: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(name)
    text = printed(report, 100)
    lines = text.splitlines()
    for label, *cells in comparison_rows(report)[1:]:
        line = next(line for line in lines if line.strip().startswith(label + " "))
        rest = line.strip()[len(label) :]
        for cell in cells:  # in order, each whole
            before, found, rest = rest.partition(cell)
            assert found, (label, cell)
            assert not before.strip()
        assert not rest.strip()
    table = text.partition("distillation ratio")[0].splitlines()
    assert max(map(len, table)) <= 100


def test_table_is_not_cut_where_nothing_is_a_terminal(everything: dict[str, Any]) -> None:
    text = printed(everything, width=40)
    assert "0.759 ± 0.005  0.778 ± 0.003  0.824 ± 0.003  0.826 ± 0.003" in text
    assert "…" not in text


def test_table_says_ratio_and_warnings(single: dict[str, Any], five: dict[str, Any]) -> None:
    assert "(S_kd - S) / (T - S) = 0.75\n" in printed(single)
    assert "warning: One seed only" in printed(single)
    assert "= 0.75 ± 0.03 over 5 seeds" in printed(five)
    assert "undefined" in printed(report_of(models(teacher=0.7)))


def test_titles_with_markup_are_printed_as_they_are() -> None:
    results = [replace(result, title=f"[bold]{result.name}[/x]|") for result in models()]
    report = report_of(results)
    assert "[bold]distilled[/x]|" in printed(report)
    assert "\\[bold\\]distilled\\[/x\\]\\|" in markdown_table(report), "so that a page shows it"


def test_summary_in_plain_words(single: dict[str, Any]) -> None:
    text = summary(single)
    assert "keeps 97.4% of the teacher's accuracy with 5.5x fewer parameters" in text
    assert "and is 12x faster" in text
    assert "closed 75% of the gap" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distilled": (0.7,)}, "Distillation did not help"),
        ({"teacher": 0.7}, "no gap for distillation to close"),
        ({"teacher": math.nan}, "Accuracy on the test split: teacher unknown"),
    ],
)
def test_summary_does_not_boast(change: dict[str, Any], words: str) -> None:
    text = summary(report_of(models(**change)))
    assert words in text
    assert "% of the gap" not in text


def test_summary_of_a_larger_slower_student() -> None:
    results = models()
    results[2] = replace(results[2], size=Size(45_426_432, 1, 1), latency=Latency(24.6, 30.0, 5, 1, "cpu"))
    assert "with 2.0x more parameters and is 2.0x slower" in summary(report_of(results))


def test_markdown_report_has_what_a_reader_needs(single: dict[str, Any]) -> None:
    text = report_markdown(single)
    for words in (
        summary(single),
        markdown_table(single),
        "> **Warning.** One seed only",
        "![Validation accuracy during training](curves.png)",
        "selected by accuracy on the validation split",
        "kd-train experiment=quickstart",
        "| temperature | 2.0 |",
    ):
        assert words in text
