"""scripts/fault_campaign.py ends as it should, and would notice if something did not."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def faults() -> Any:
    """The campaign's modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield {
            name: importlib.import_module(f"faults.{name}") for name in ("page", "toy", "events", "process", "damages")
        }


@pytest.mark.slow
def test_a_few_of_each_kind_end_as_they_should(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "scripts/fault_campaign.py", "--quick", "--lanes", "1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counted = json.loads(result.stdout[result.stdout.index("{") :])
    assert set(counted) == {"kills", "damages", "configurations", "names"}


def outcome(faults: Any, code: int | None, err: str) -> Any:
    return faults["process"].Outcome(code, "", err, 0.0)


@pytest.mark.parametrize(
    ("err", "code", "one"),
    [
        ("kd-train: alpha=2 must lie in [0, 1]\n", 2, True),
        ("TextFiles: 63 train\nkd-train: no\n", 1, True),  # a notice before it
        ("usage: kd-eval [-h]\nkd-eval: error: no\n", 2, True),
        ("Error executing job with overrides: []\nkd-train: no\n", 2, False),
        ("kd-train: no\nand why\n", 1, False),
        ("x.py:1: UserWarning: hm\nkd-train: no\n", 1, False),
        ("", 1, False),
    ],
)
def test_what_counts_as_one_line(faults: Any, err: str, code: int, one: bool) -> None:
    assert outcome(faults, code, err).in_one_line is one
    assert not outcome(faults, code, err).crashed


def test_a_traceback_is_noticed(faults: Any) -> None:
    assert outcome(faults, 1, "kd-train: x\nTraceback (most recent call last):\n  File\nValueError: y\n").crashed


def test_contents_differ_where_results_do_and_not_where_times_do(faults: Any, tmp_path: Path) -> None:
    toy = faults["toy"]
    place = toy.new_place(tmp_path / "a")
    (place.work / "stage.json").write_text('{"seconds": 1.5, "steps": 3}')
    (place.work / "version_0").mkdir()
    (place.work / "version_0" / "metrics.csv").write_text("a")
    copy = place.copied(tmp_path / "b")
    (copy.work / "stage.json").write_text('{"seconds": 7, "steps": 3}')
    (copy.work / "version_0").rename(copy.work / "version_4")
    assert toy.contents(place) == toy.contents(copy)
    (copy.work / "stage.json").write_text('{"seconds": 7, "steps": 4}')
    (copy.work / ".stage.json.77").touch()
    (copy.work / "version_4" / "metrics.csv").unlink()
    assert toy.differences(toy.contents(place), toy.contents(copy)) == {
        "left behind": ["work/.stage.json.77"],
        "missing": ["work/version_N/metrics.csv"],
        "other": ["work/stage.json"],
    }


@pytest.mark.parametrize("way", ["SIGKILL", "torn", "SIGTERM"])
def test_a_process_ends_at_the_event_it_is_told(faults: Any, tmp_path: Path, way: str) -> None:
    program = (
        "import sys; from pathlib import Path; from faults.events import ending; root = Path(sys.argv[1]);"
        "ending(root / 'in', root / 'note', 3, sys.argv[2], 10)();"
        "[(root / 'in' / str(n)).write_text('x' * 100) for n in range(1, 6)]"
    )
    (tmp_path / "in").mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), way], env=environment, timeout=120, check=False
    )
    assert ended.returncode < 0
    assert (tmp_path / "note").read_text() == "open w 3"
    written = {file.name: file.stat().st_size for file in (tmp_path / "in").iterdir()}
    assert written == {"1": 100, "2": 100} | ({"3": 10} if way == "torn" else {})


def test_every_damage_changes_the_file(faults: Any, tmp_path: Path) -> None:
    damages, draw = faults["damages"], random.Random(0)
    for kind in damages.KINDS:
        place = faults["toy"].new_place(tmp_path / kind)
        for name in ("a.bin", "b.bin"):
            (place.work / name).write_bytes(name.encode() * 50)
        damages.damage(place.work / "a.bin", kind, draw, place)
        file = place.work / "a.bin"
        assert not file.exists() or file.read_bytes() != b"a.bin" * 50, kind


def test_the_page_counts_by_outcome_and_names_what_is_wrong(faults: Any) -> None:
    page = faults["page"]
    trials = [
        {"group": "kills", "what": "kd-train", "outcome": "finished"},
        {"group": "kills", "what": "kd-train", "outcome": "left behind"},
        {"group": "damages", "what": "predict", "outcome": "right"},
    ]
    assert [page.is_good(trial) for trial in trials] == [True, False, True]
    machine = {"cpu": "C", "cores": 2, "versions": {"torch": "2"}, "date": "2026-11-28T00"}
    content = {
        "counts": page.counts(trials[:2]), "environment": machine, "command": "x", "minutes": 1.0,
        "not as it should be": trials[1:2],
    }  # fmt: skip
    text = page.table({"kills": content})
    assert "| `kd-train` | 2 | 1 | 1 |" in text
    assert "**1 did not end as they should**" in text
