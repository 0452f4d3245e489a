"""What a user installs from a wheel finds its configuration inside the package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.conftest import tiny_overrides, write_toy_csv


@pytest.mark.slow
def test_the_wheel_carries_conf_and_runs_without_the_checkout(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    in_checkout = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    in_wheel = {str(path.relative_to(site / "kd_lightning")) for path in (site / "kd_lightning/conf").rglob("*.yaml")}
    assert in_wheel == in_checkout
    assert (site / "kd_lightning" / "py.typed").is_file()
    entry_points = next(site.glob("*.dist-info")).joinpath("entry_points.txt").read_text()
    assert all(f"{name} = kd_lightning." in entry_points for name in ("kd", "kd-train", "kd-eval", "kd-predict"))

    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import kd_lightning.config.instantiate as c; print(c.conf_dir())"
    found = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    assert found.stdout.strip() == str(site / "kd_lightning" / "conf")
    composed = subprocess.run(
        [sys.executable, "-m", "kd_lightning.cli", "train", "--cfg", "job", "experiment=quickstart"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "name: quickstart" in composed.stdout

    small = tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path / "run")
    environment |= {"KD_LIGHTNING_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    trained = subprocess.run(
        [sys.executable, "-m", "kd_lightning.cli.train", *small, "trainer.max_epochs=1"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "report.md").is_file()
