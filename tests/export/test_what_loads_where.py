"""Each cell of the table in docs/export.md: a student is exported and loaded, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kd_lightning.export.exported import read_exported
from kd_lightning.export.formats import FORMATS
from kd_lightning.export.load import load_export
from kd_lightning.models.cnn import ResNet
from tests import ROOT
from tests.export.conftest import Exports, needs
from tests.export.runs import cnn_run, lm_run, text_cnn_run
from tests.export.test_refusals import refusal

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
MADE: dict[str, Callable[[Path], Path]] = {
    "text_cnn": text_cnn_run,
    "causal_lm": lm_run,
    "resnet": lambda folder: cnn_run(folder, lambda **sizes: ResNet(**sizes, depth=8, width=0.5)),
}
FIXTURES = {"bilstm": "bilstm", "transformer": "bert", "cnn": "pictures"}


def table() -> list[tuple[str, str, bool]]:
    """Return the table's cells: student, format, and whether it can be had."""
    rows = PAGE.partition("## What loads where")[2].partition("\n\n`tests/")[0].splitlines()
    heading, _, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    formats = [cell.split("`")[1] for cell in heading[1:]]
    return [
        (row[0].split("`")[1], format, cell.startswith("yes"))
        for row in body
        for format, cell in zip(formats, row[1:], strict=True)
    ]


CELLS = table()


def test_the_table_has_every_format_that_takes_more_than_one_kind_of_student() -> None:
    assert {format for _, format, _ in CELLS} == {*FORMATS} - {"gguf", "peft", "sentence_transformers"}
    assert {student for student, _, _ in CELLS} == {*MADE, *FIXTURES}


@pytest.fixture(scope="module")
def student(request: pytest.FixtureRequest, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    if name in FIXTURES:
        return request.getfixturevalue(FIXTURES[name])  # type: ignore[no-any-return]
    return MADE[name](tmp_path_factory.mktemp(name) / name)


@pytest.mark.slow
@pytest.mark.parametrize(("student", "format", "can"), CELLS, indirect=["student"])
def test_a_cell(student: Path, format: str, can: bool, exports: Exports, tmp_path: Path) -> None:
    needs(format)
    if not can:
        assert f"--format {format}" in refusal(tmp_path, student, "--format", format)
        return
    out = exports(student, format)
    parity = read_exported(out).parity
    assert parity["agreement"] >= 0.999
    assert load_export(out, trust=True).class_names == read_exported(out).class_names
