from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kd_lightning.runtime import threads


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores, no quota, no SLURM."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cpu.max"


@pytest.mark.parametrize(
    ("quota", "slurm", "cores"),
    [(None, None, 8), ("max 100000", None, 8), ("250000 100000", None, 3), ("50000 100000", None, 1),
     (None, "2", 2), ("400000 100000", "2", 2), (None, "16", 8)],
)  # fmt: skip
def test_the_smallest_limit_counts(
    bare: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, slurm: str | None, cores: int
) -> None:
    if quota is not None:
        bare.write_text(quota + "\n")
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert threads.usable_cores() == cores


def test_torch_gets_them_unless_the_user_has_said_how_many(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    threads.settle_threads()
    assert given == [3]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads.settle_threads()
    assert given == [3]
