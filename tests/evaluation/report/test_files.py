from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.evaluation.report import load_report, write_report
from kd_lightning.runtime.errors import DataError
from kd_lightning.runtime.files import write_file


def test_files_are_written_and_read_again(five: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    assert write_report(five, folder) == folder / "report.md"
    assert sorted(path.name for path in folder.iterdir()) == [
        "curves.png",
        "report.html",
        "report.json",
        "report.md",
        "tradeoff.png",
    ]
    for name in ("curves.png", "tradeoff.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size > 10_000
    assert load_report(folder) == load_report(folder / "report.json") == five


def test_failure_leaves_the_old_report(five: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(five, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report({**five, "run": "other", "settings": {"alpha": math.nan}}, tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "report.json", b"half")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such report"),
        ("{", "cannot be read"),
        ('{"schema_version": 99}', "schema_version is 99"),
        ("[]", "checksum does not match"),
    ],
)
def test_reports_that_cannot_be_read(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(DataError, match=words):
        load_report(tmp_path)


def test_import_is_light() -> None:
    heavy = ("torch", "matplotlib", "lightning")
    code = f"import sys, kd_lightning.evaluation.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
