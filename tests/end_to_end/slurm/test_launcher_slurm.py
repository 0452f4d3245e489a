"""Sweeps on a real SLURM: as an array through Hydra's launcher, and as chained jobs that end in a report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_lightning.cli.slurm.status import begun, status
from kd_lightning.runtime.slurm_queue import ended, queued
from tests import ROOT
from tests.conftest import tiny_overrides, write_toy_csv
from tests.waiting import wait_for

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

SMALL = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=30"]


@pytest.fixture
def toy(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The overrides of a run of seconds, but for its folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path)
    return [override for override in small if not override.startswith("run_dir")]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def submit_chain(*arguments: str) -> dict[str, str]:
    """Submit a chain and wait until none of its jobs is in the queue; returns their ids."""
    done = run("kd_lightning.cli.slurm.command", "pipeline", *arguments, *SMALL)
    assert done.returncode == 0, done.stderr
    folder = next(Path(word.partition("=")[2]) for word in arguments if word.startswith("hydra.sweep.dir="))
    jobs: dict[str, str] = json.loads((folder / "slurm/jobs.json").read_text())["jobs"]
    wait_for(lambda: not queued(jobs.values()), f"the end of the jobs {', '.join(jobs.values())}", timeout=240)
    return jobs


def weights(sweep: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        file.parent.parent.parent.name: load_file(file) for file in sweep.glob("*/seed_0/distill/model.safetensors")
    }


def test_an_array_through_hydras_launcher_is_the_local_sweep(tmp_path: Path, toy: list[str]) -> None:
    grid = [*toy, "temperature=1,4"]
    here, there = tmp_path / "here", tmp_path / "there"
    done = run("kd_lightning.cli.train", "-m", "hydra/launcher=slurm", *SMALL, *grid, f"hydra.sweep.dir={there}")
    assert done.returncode == 0, done.stderr
    assert run("kd_lightning.cli.train", "-m", *grid, f"hydra.sweep.dir={here}").returncode == 0

    links, rows = status(there)
    assert links == []
    assert [(row.name, row.state) for row in rows] == [(f"temperature={t}", "finished") for t in (1, 4)]
    assert len({str(row.job).partition("_")[0] for row in rows}) == 1, "one array"
    assert [str(row.job).partition("_")[2] for row in rows] == ["0", "1"]
    assert {row.log.parent for row in rows if row.log} == {there / "slurm"}
    assert all(row.log for row in rows)
    for point in begun(there).values():
        log = next(point.glob("slurm/*.out"))
        assert f"writes to {point}" in log.read_text()
    assert len(list(there.glob("shared/teacher-*"))) == len(list(there.glob("shared/baseline-*"))) == 1

    expected, found = weights(here), weights(there)
    assert found.keys() == expected.keys()
    assert len(found) == 2
    for name, network in expected.items():
        for key, tensor in network.items():
            assert torch.equal(found[name][key], tensor), (name, key)


def test_a_chain_ends_in_a_report_and_runs_again_only_what_failed(tmp_path: Path, toy: list[str]) -> None:
    sweep = tmp_path / "sweep"
    given = [*toy, f"hydra.sweep.dir={sweep}", "--sweep", "alpha=0.5,1.5"]
    jobs = submit_chain(*given)
    assert list(jobs) == ["teacher", "cache", "sweep", "report"]
    links, rows = status(sweep)
    assert [(row.name, row.state) for row in rows] == [("alpha=0.5", "finished"), ("alpha=1.5", "failed")]
    assert rows[1].says == "ConfigError: alpha=1.5 must be between 0 (labels only) and 1 (teacher only)"
    assert [(row.name, row.state) for row in links] == [(name, "finished") for name in ("teacher", "cache", "report")]
    assert ended([jobs["sweep"]])[f"{jobs['sweep']}_1"] == "FAILED", "where the command's exit code is SLURM's"
    assert "alpha=1.5 must be between" in (sweep / "report.html").read_text()

    point = begun(sweep)[frozenset(json.loads((sweep / "slurm/jobs.json").read_text())["points"][0])]
    log = (point / "slurm" / f"{jobs['sweep']}_0.out").read_text()
    assert f"SLURM job {jobs['sweep']}_0 on " in log
    assert "teacher  finished before" in log
    assert "teacher  predicted" not in log, "the cache's job has run the teacher"
    assert "for all runs" in (sweep / "slurm" / f"{jobs['cache']}.out").read_text()
    times = subprocess.run(
        ["sacct", "-XnP", "--format=Start,End", f"--jobs={','.join(jobs.values())}"], capture_output=True, text=True,
        timeout=120,
    ).stdout.split()  # fmt: skip
    spans = [line.split("|") for line in times]
    assert spans[0][1] <= spans[1][0] <= spans[1][1] <= min(spans[2][0], spans[3][0])

    again = run("kd_lightning.cli.slurm.command", "pipeline", *given, "--dry-run").stdout
    assert "2 points, 1 finished before" in again
    assert "#SBATCH --array=1%32" in again


def test_where_the_teacher_fails_nothing_waits_for_ever(tmp_path: Path, toy: list[str]) -> None:
    sweep = tmp_path / "sweep"
    (tmp_path / "toy.csv").unlink()
    jobs = submit_chain(*toy, f"hydra.sweep.dir={sweep}", "--sweep", "alpha=0.5,0.9")
    over = ended(jobs.values())
    assert over[jobs["teacher"]] == "FAILED"
    assert over[jobs["cache"]] == "CANCELLED"
    links, rows = status(sweep)
    assert [row.state for row in links[:2]] == ["failed", "failed"]
    assert [row.state for row in rows] == ["not started", "not started"]
    assert "toy.csv: no such file" in links[0].log.with_suffix(".err").read_text()
