"""A command that a launcher started once per device: what is counted, what is refused, who does what."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from kd_lightning.config.resolvers import ddp_strategy
from kd_lightning.pipeline.validation import validate
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.processes import environment, first, join, launched, rank
from tests import ROOT
from tests.conftest import tiny_overrides, write_toy_csv


def test_without_a_launcher_a_command_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script without srun
    assert (launched(), rank(), ddp_strategy()) == (1, 0, "ddp_spawn")
    assert type(environment()).__name__ == "LightningEnvironment"
    with first():
        pass


@pytest.mark.parametrize(
    ("started", "kind"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
            "SLURMEnvironment",
        ),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}, "TorchElasticEnvironment"),
    ],
)
def test_what_a_launcher_started_is_known_before_the_processes_meet(
    started: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert (launched(), rank(), ddp_strategy()) == (2, 1, "ddp")
    assert type(environment()).__name__ == kind
    assert not getattr(environment(), "auto_requeue", False), "Lightning's handler saves inside the signal handler"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=cpu"], "2 processes were started for this command .* and trainer wants 1: set trainer.devices"),
        (["trainer=ddp", "trainer.strategy=ddp_spawn"], "starts processes itself, and 2 are there already"),
        (["trainer=ddp", "trainer.devices=3"], "2 processes were started .* and trainer wants 3"),
    ],
)
def test_processes_that_do_not_match_are_refused(
    overrides: list[str], message: str, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(ConfigError, match=message):
        validate(composed(*overrides))


def test_an_srun_that_leaves_open_where_its_tasks_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(KDError, match="--ntasks-per-node=2"):
        join()


@pytest.mark.slow
def test_two_launched_processes_train_as_two_spawned_ones_and_write_once(tmp_path: Path) -> None:
    csv_file = write_toy_csv(tmp_path / "toy.csv")
    environment = {**os.environ, "KD_LIGHTNING_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def overrides(name: str) -> list[str]:
        brief = ["trainer=ddp", "trainer.max_epochs=2", "stages=[teacher,distill]"]
        return [*tiny_overrides(csv_file, tmp_path / name), *brief]

    train = [sys.executable, "-m", "kd_lightning.cli.train", *overrides("spawned")]
    spawned = subprocess.run(train, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert spawned.returncode == 0, spawned.stderr
    launched = torchrun(environment, *overrides("launched"))
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("report:") == 1, "one of the processes speaks"
    for stage in ("teacher", "seed_0/distill"):
        weights = [load_file(tmp_path / name / stage / "model.safetensors") for name in ("spawned", "launched")]
        for name, tensor in weights[0].items():
            assert torch.equal(weights[1][name], tensor), f"{stage} {name}"
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("spawned", "launched")]
    assert reports[0]["models"]["distilled"]["test"] == reports[1]["models"]["distilled"]["test"]

    refused = torchrun(environment, *overrides("launched"), "temperature=3")
    assert refused.returncode != 0
    assert refused.stderr.count("holds a finished run with other settings") == 1
    assert str(ROOT / "kd_lightning") not in refused.stderr, "the only traceback is torchrun's own"


def torchrun(environment: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    return subprocess.run(
        [*run, "-m", "kd_lightning.cli.train", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
