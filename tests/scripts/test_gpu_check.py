"""The check that is prepared for a machine with a GPU, run on this one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import ROOT


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh", "--cpu", str(tmp_path / "found.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert all(part["ok"] for part in parts.values())
    assert " passed" in parts["tests"]["summary"]
    assert "failed" not in parts["tests"]["summary"]
    for name, part in parts.items():
        assert part["figures"] or name == "tests", name
        assert all(figure["median"] > 0 for figure in part["figures"]), name


def test_what_is_wrong_with_the_call_is_said() -> None:
    done = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--gather" in done.stderr
    assert "--cpu" in done.stderr
