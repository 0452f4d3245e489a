from __future__ import annotations

from pathlib import Path

import pytest

from kd_lightning.runtime import memoize
from kd_lightning.runtime.memoize import stamps


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memoize, "_KEPT", {})


def test_a_thing_is_made_once_for_its_key_and_kind() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    assert [memoize.shared("a", key, make) for key in (1, 2, 1, 2)] == [0, 1, 0, 1]
    assert memoize.shared("b", 1, make) == 2


def test_the_last_four_of_a_kind_are_kept_and_the_oldest_goes_before_the_next_is_made() -> None:
    for key in range(5):
        memoize.shared("a", key, lambda key=key: key)
    assert [key for key, _ in memoize._KEPT["a"]] == [1, 2, 3, 4]

    def count() -> int:
        return len(memoize._KEPT["a"])

    assert memoize.shared("a", 5, count) == 3


def test_what_failed_is_not_kept() -> None:
    with pytest.raises(ZeroDivisionError):
        memoize.shared("a", 1, lambda: 1 // 0)
    assert memoize.shared("a", 1, lambda: "made") == "made"


def test_stamps_change_with_the_files_that_settings_name(tmp_path: Path) -> None:
    file, folder = tmp_path / "my.csv", tmp_path / "folder"
    folder.mkdir()
    file.write_text("a")
    (folder / "weights").write_text("a")
    settings = {"train_file": str(file), "more": [{"name": str(folder)}], "text_column": "text", "views": 2}
    before = stamps(settings)
    assert [Path(path).name for path, _, _ in before] == ["my.csv", "weights"]
    assert stamps(settings) == before
    (folder / "weights").write_text("ab")
    assert stamps(settings) != before
