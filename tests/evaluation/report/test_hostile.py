"""Names of other people in reports: in pictures, Markdown, HTML and on the terminal."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from kd_lightning.evaluation.report.files import load_report, write_report
from kd_lightning.evaluation.report.pictures import curves_figure, shares_figure, tradeoff_figure
from kd_lightning.evaluation.report.sweep import report_sweep
from kd_lightning.evaluation.report.sweep.page import render
from kd_lightning.evaluation.report.sweep.pictures import figures
from kd_lightning.evaluation.report.text import report_markdown
from kd_lightning.export.benchmark_files import picture
from tests.evaluation.report.examples import printed
from tests.evaluation.report.sweeps import begin, finish, grid, students
from tests.evaluation.report.test_shares import shared
from tests.evaluation.report.test_sweep import Page, document
from tests.names import HOSTILE

SHORT = ["$\\frac$", "a$b$\x1b[31m", "_x\ny", "a" * 300 + "\ud800", ""]
IMAGE = re.compile(r"(?<!\\)(?:\\\\)*\]\(http")
"""A link or image of Markdown that is none of ours."""


def named(name: str) -> dict[str, Any]:
    """A report in which whatever has a name has this one."""
    report = shared({name: [0.5, 0.75], "kd": [0.5, 0.25]}, {name: [0.9, 0.8], "kd": [0.1, 0.2]})
    report["task"] = name
    report["data"] |= {"name": name, "monitor": f"{name}/accuracy", "class_names": [name, "b"]}
    report["scores"][f"{name}/accuracy"] = report["scores"]["accuracy"] | {"title": f"{name}: accuracy"}
    report["data"]["splits"][name] = 3
    report["settings"] = {name: name}
    report["stages"] = {name: 1.0}
    report["environment"][name] = [name]
    report["selection"] = f"Selected by {name}."
    report["warnings"] = [f"{name} hardly counts"]
    report["samples"] = [{"prompt": name, "models": {"teacher": name, "distilled": f"{name}\n# {name}"}}]
    for model in report["models"].values():
        model["title"] = f"{name}"
        for split in ("test", "validation"):
            model[split][f"{name}/accuracy"] = model[split]["accuracy"]
    return report


def swept(folder: Path, name: str) -> dict[str, Any]:
    """A sweep in which parameters, values, scores and errors have this name."""
    made = document(folder)
    made["score"] = f"{name}/accuracy"
    made["scores"] = {made["score"]: {"title": f"{name}: accuracy", "mode": "max"}}
    for parameter in made["parameters"]:
        parameter["name"] += name
        if not parameter["numeric"]:
            for value in parameter["values"]:
                value["value"] += name
    for entry in [*made["configurations"], *made["failed"], *made["unfinished"], made["chosen"]]:
        entry["values"] = {
            key + name: value + name if isinstance(value, str) else value for key, value in entry["values"].items()
        }
    for point in made["failed"]:
        point |= {"error": name, "traceback": f"Traceback\n{name}", "command": f"kd-train {name}"}
    return made


def drawn_as_text(figure: Figure) -> None:
    """Draw, without mathematics but for the marks of logarithmic scales."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|constrained_layout|Tight layout")
        figure.savefig(io.BytesIO(), format="png", dpi=50)
    for text in figure.findobj(Text):
        written = text.get_text()
        assert len(written) <= 250, written
        assert written.replace("\n", "").isprintable(), ascii(written)
        if "mathdefault" not in written:
            assert not text._preprocess_math(written)[1], written


@pytest.mark.parametrize("name", SHORT)
def test_pictures_of_a_run(name: str) -> None:
    report = named(name)
    report["models"]["distilled"]["curves"] = [
        {**curve, "validation_score": {"steps": [0, 50], "values": [0.5, 0.6]}}
        for curve in report["models"]["distilled"]["curves"]
    ]
    made = [draw(report) for draw in (curves_figure, tradeoff_figure, shares_figure)]
    for figure in made:
        assert figure is not None
        drawn_as_text(figure)
    assert made[2] is not None
    assert len(made[2].legends[0].get_texts()) == 2, "every term has its line in the legend"


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("points", [grid, students])
def test_pictures_of_a_sweep(name: str, points: Any, tmp_path: Path) -> None:
    made = list(figures(swept(points(tmp_path / "sweep"), name)))
    assert len(made) > 1
    for _, _, figure in made:
        drawn_as_text(figure)


@pytest.mark.parametrize("name", SHORT)
def test_the_picture_of_a_benchmark(name: str, tmp_path: Path) -> None:
    row = {"name": name, "kind": "onnx", "of": "student", "latency_ms": {"p50": 1.0}, "file_bytes": 1000}
    picture({"rows": [row, {**row, "of": "teacher"}]}, tmp_path / "benchmark.png")
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_run_tells(name: str) -> None:
    report = named(name)
    table = printed(report)
    assert plain(table)
    if "\x1b" in name:
        assert "\\x1b" in table
    text = report_markdown(report)
    assert plain(text)
    assert "<" not in text
    assert not IMAGE.search(text)
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]
    assert "`x`" not in text.replace("\\`", "")


def test_half_a_surrogate_pair_is_written_and_read(tmp_path: Path) -> None:
    report = named("\ud800\u202e")
    write_report(report, tmp_path)
    assert load_report(tmp_path) == report
    assert plain((tmp_path / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_of_a_sweep(name: str, tmp_path: Path) -> None:
    text = render(swept(grid(tmp_path / "sweep"), name), name, [(name, b"")])
    assert plain(text)
    text.encode()
    page, usual = Page(text), Page(render(document(tmp_path / "sweep"), "sweep", [("", b"")]))
    assert page.tags == usual.tags
    assert page.loads == usual.loads


@pytest.mark.parametrize("name", ["$\\frac$<script>", "\x1b[2J\\ud800", "../x", "x" * 200])
def test_a_sweep_over_such_values_is_reported(name: str, tmp_path: Path) -> None:
    for value, score in ((name, 0.8), ("b", 0.7)):
        finish(begin(tmp_path / "sweep", **{"model@student": value}), score)
    report_sweep(tmp_path / "sweep")
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}


def plain(text: str) -> bool:
    """Whether nothing in it but ends of lines commands, turns or breaks."""
    return not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in text.replace("\n", ""))
