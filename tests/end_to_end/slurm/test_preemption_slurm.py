"""Two-task jobs on a real SLURM that are told to stop, preempted or killed: they go on, to the very same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_lightning.cli.slurm.status import begun, status
from kd_lightning.runtime.slurm_queue import ended
from scripts.preemption_trials import CLUSTER, ROOT, Event, Job, accounting, overrides, train_teacher
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(2400)]

EVERY, STEPS = 25, 220
SHORT = [f"trainer.max_steps={STEPS}", f"checkpoint_every_n_steps={EVERY}", "validations=5"]
"""220 steps of milliseconds, in epochs of 11."""
MIDDLE = 60
"""A step in mid-epoch that lies between two checkpoints."""
ALONE = ["--nodelist=127.0.0.2", "--exclusive"]
"""A node to itself: what is done to it is done to no other test."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield tmp_path_factory.mktemp("preemption")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    return train_teacher(folder)


@pytest.fixture(scope="module")
def whole(folder: Path, teacher: Path) -> Path:
    """The stage that a job leaves which nothing interrupts."""
    job = Job(folder, "whole", teacher, SHORT)
    assert job.wait_until_over() == "COMPLETED", job.log.read_text()
    assert [event.step for event in job.events() if event.what == "step"] == list(range(1, STEPS + 1))
    return job.stage


def same(stage: Path, whole: Path) -> None:
    """Check that a stage has the last weights of both ranks, the selected ones and the scores of another."""
    for rank in range(2):
        found, expected = (torch.load(one / f"final-{rank}.pt", weights_only=True) for one in (stage, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items()), rank
    selected = [load_file(one / "model.safetensors") for one in (stage, whole)]
    assert all(torch.equal(selected[0][name], weight) for name, weight in selected[1].items())
    records = [json.loads((one / "stage.json").read_text()) for one in (stage, whole)]
    for key in ("steps", "best_step", "validation"):
        assert records[0][key] == records[1][key]


def resumed_where_it_stopped(first: list[Event], second: list[Event]) -> None:
    """Check that a rank left in mid-training, and went on with the step after its last."""
    assert (first[0].step, first[-1].what) == (0, "leaves")
    assert MIDDLE <= first[-1].step < STEPS
    assert (second[0].what, second[0].step) == ("begins", first[-1].step)


@pytest.mark.parametrize("how", ["requeue", "preempted"])
def test_a_batch_job_goes_on_where_it_was(how: str, folder: Path, teacher: Path, whole: Path) -> None:
    job = Job(folder, how, teacher, SHORT, ALONE if how == "preempted" else [])
    job.wait_for_step(0, MIDDLE)
    if how == "requeue":  # by whoever may; SLURM sends SIGTERM
        subprocess.run(["scontrol", "requeue", job.id], check=True, timeout=120)
    else:  # SLURM sends the signal of --signal, and waits for GraceTime
        urgent = ["--partition=high", "--nodelist=127.0.0.2", "--exclusive", "--output=/dev/null", "--wrap=true"]
        subprocess.run(["sbatch", *urgent], check=True, stdout=subprocess.DEVNULL, timeout=120)
    job.wait_until_left(0)
    assert job.wait_until_over() == "COMPLETED", job.log.read_text()

    for rank in range(2):
        resumed_where_it_stopped(job.of_start(0, rank), job.of_start(1, rank))
    same(job.stage, whole)
    assert job.described()["Restarts"] == "1"
    assert accounting(job) in ({"REQUEUED": 1, "COMPLETED": 1}, {"PREEMPTED": 1, "COMPLETED": 1})
    log = job.log.read_text()
    assert log.count("SLURM job") == 2
    assert log.count("is requeued") == (0 if how == "requeue" else 1)
    assert "Traceback" not in log


def test_under_submitit_submitit_puts_the_job_back(folder: Path, teacher: Path, whole: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    sweep = folder / "sweep"
    settings = [one for one in overrides(folder, folder, teacher) if not one.startswith("run_dir=")]
    launcher = ["cpus_per_task=1", "timeout_min=30", "array_parallelism=1"]
    command = [sys.executable, "-m", "kd_lightning.cli.train", "-m", "hydra/launcher=slurm", f"hydra.sweep.dir={sweep}"]
    command += [*settings, *SHORT, "trainer=ddp", "alpha=0.5,0.9", *(f"hydra.launcher.{one}" for one in launcher)]
    home = {**os.environ, "KD_LIGHTNING_HOME": str(folder / "sweep-home")}
    with subprocess.Popen(command, cwd=ROOT, env=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            second = point(sweep, "alpha=0.9", process)
            job = SweepJob(second, str(status(sweep)[1][1].job))
            job.wait_for_step(0, MIDDLE)
            finished = (point(sweep, "alpha=0.5", process) / "seed_0/distill/stage.json").stat()
            subprocess.run(["scancel", "--signal=USR2", job.id], check=True, timeout=120)
            error = process.communicate(timeout=600)[1].decode()
            assert process.returncode == 0, error
        finally:
            process.kill()

    for rank in range(2):
        resumed_where_it_stopped(job.of_start(0, rank), job.of_start(1, rank))
    same(job.stage, whole)
    array = job.id.partition("_")[0]
    assert job.id == f"{array}_1"
    assert accounting(job) == {"REQUEUED": 1, "COMPLETED": 1}
    log = "".join(file.read_text() for file in (sweep / "slurm").glob(f"{job.id}_*_log.*"))
    assert "this job is preempted" in log  # what submitit says next may be lost: SLURM ends the job as it is put back
    assert "is requeued" not in log, "submitit does it, and we do not"
    second_rank = (sweep / "slurm" / f"{job.id}_1_log.out").read_text()
    assert "distill, seed" not in second_rank, "the second process says nothing of its own"

    assert ended([array])[f"{array}_0"] == "COMPLETED"
    assert (point(sweep, "alpha=0.5") / "seed_0/distill/stage.json").stat() == finished
    assert (sweep / "slurm" / f"{array}_0_0_log.out").read_text().count("SLURM job") == 1, (
        "a finished point is left alone"
    )
    again = subprocess.run(command, cwd=ROOT, env=home, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    for alpha in ("0.5", "0.9"):
        place = point(sweep, f"alpha={alpha}")
        assert len(list(place.glob("slurm/*.out"))) == 2
        assert len(list(place.glob("seed_0/distill/csv/*"))) == (1 if alpha == "0.5" else 2), "trained no more"


class SweepJob(Job):
    """One that submitit submitted."""

    def __init__(self, point: Path, job: str) -> None:
        self.folder, self.id = point, job
        self.log = point / "slurm" / f"{job}.out"
        self.stage = point / "seed_0" / "distill"


def point(sweep: Path, override: str, process: subprocess.Popen[bytes] | None = None) -> Path:
    """Wait until a process has begun a point of a sweep; returns its folder."""

    def found() -> Path | None:
        return next((place for asked, place in begun(sweep).items() if override in asked), None)

    place = wait_for(found, f"the point {override}", process, timeout=600)
    assert place is not None
    return place


def test_a_dead_node_costs_at_most_the_steps_since_the_last_checkpoint(
    folder: Path, teacher: Path, whole: Path
) -> None:
    job = Job(folder, "dead", teacher, SHORT, ALONE)
    job.wait_for_step(0, MIDDLE)
    try:
        kill_node_2(job.id)
    finally:
        subprocess.run([CLUSTER, "start"], check=True, stdout=subprocess.DEVNULL, timeout=120)
    job.wait_for_start(1)
    assert job.wait_until_over() == "COMPLETED", job.log.read_text()

    for rank in range(2):
        first, second = job.of_start(0, rank), job.of_start(1, rank)
        assert first[-1].what == "step"
        assert second[0].what == "begins"
        assert second[0].step % EVERY == 0
        assert first[-1].step - EVERY <= second[0].step <= first[-1].step
    same(job.stage, whole)
    assert job.described()["Restarts"] == "1"
    nodes = subprocess.run(
        ["sinfo", "-hN", "-o", "%N %t"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert set(nodes.splitlines()) <= {
        f"127.0.0.{node} {state}" for node in (1, 2) for state in ("idle", "mix", "alloc")
    }


def kill_node_2(job: str) -> None:
    """Kill slurmd, and the job's step daemons and all that they started, at once and without a word."""
    processes = {int(file.name): described(file) for file in Path("/proc").iterdir() if file.name.isdigit()}
    dead = {pid for pid, (_, name, _) in processes.items() if name.startswith(f"slurmstepd: [{job}.")}
    assert len(dead) == 2, "the batch script's and the step's"
    while more := {pid for pid, (parent, _, _) in processes.items() if parent in dead} - dead:
        dead |= more
    assert len(dead) > 5, "two step daemons, srun and two trainings"
    daemon = {pid for pid, (_, name, mark) in processes.items() if name.startswith("slurmd ") and mark}
    assert len(daemon) == 1
    watching = [*daemon, *(pid for pid in dead if processes[pid][1].startswith("slurmstepd"))]
    for pid in [*watching, *(dead - set(watching))]:  # those first that would report how the others have died
        os.kill(pid, signal.SIGSTOP)
    for pid in [*watching, *(dead - set(watching))]:
        os.kill(pid, signal.SIGKILL)


def described(process: Path) -> tuple[int, str, bool]:
    """Return of a process in /proc its parent, its command line, and whether it is the second node's slurmd."""
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        marks = (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is not ours to look at
        return -1, "", False
    return parent, command, any(mark.startswith(b"KD_SLURM_DAEMON=") and mark.endswith(b"slurmd-2") for mark in marks)
