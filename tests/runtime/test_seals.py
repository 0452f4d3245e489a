"""Files with their own checksum: whatever else stands in their place is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.runtime.seals import read_sealed, write_sealed


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", {"a": [1, "\ud800é"]})
    assert read_sealed(tmp_path / "a.json", "") == {"a": [1, "\ud800é"]}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "3", '{"a": NaN, "checksum": "x"}', '{"a": 1, "checksum": [{}]}', "[" * 200_000,
             '{"a": ' * 900 + "1" + "}" * 900, "1" * 5000, "\xff"],
)  # fmt: skip
def test_foreign_content_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(KDError, match="remove it"):
        read_sealed(tmp_path / "a.json", "remove it")


def test_json_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(KDError, match="cannot be read"):
        read_json(tmp_path / "a.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(KDError, match="no file"):
        read_sealed(tmp_path / "a.json", "remove it")
