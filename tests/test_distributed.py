"""Two processes train as one with the same global batch: the same weights, the same scores."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks

ROOT = Path(__file__).parent.parent
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Of weights around 0.1 after two epochs of float32: sums are taken in another order, no more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Run all trainings in two processes; what they came to is in the folder returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=400)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process comes to, by scenario; each is trained once."""
    return {}


def load(folder: Path, file: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{file}.{rank}.pt", weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, name, _ in ranks.trainings()])
def test_two_processes_come_to_the_weights_and_scores_of_one(
    file: str, name: str, two: Path, alone: dict[str, dict[str, Any]]
) -> None:
    if name not in alone:
        alone[name] = ranks.train(name, two)
    one, both = alone[name], load(two, file)
    assert one["weights"].keys() == both["weights"].keys()
    for key, tensor in one["weights"].items():
        torch.testing.assert_close(both["weights"][key], tensor, **TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")
    assert one["metrics"].keys() == both["metrics"].keys()
    assert both["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["soft_target", "several_tasks", "soft_target-sharded"])
def test_no_example_is_validated_twice(file: str, two: Path, alone: dict[str, dict[str, Any]]) -> None:
    name = file.removesuffix("-sharded")
    if name not in alone:
        alone[name] = ranks.train(name, two)
    assert sum(load(two, file, rank)["validated"] for rank in range(2)) == alone[name]["validated"] > 0


@pytest.mark.slow
def test_the_teacher_is_no_part_of_what_the_processes_share(two: Path) -> None:
    shared = load(two, "hint_hidden")["shared"]
    assert any("student.bert.encoder.layer.1" in name for name in shared)
    assert any("objective.terms.hint.projectors" in name for name in shared)
    assert all("student." in name or "objective." in name for name in shared)
    assert not any("encoder.layer.3" in name for name in shared), "that deep is the teacher alone"


@pytest.mark.slow
def test_every_process_has_the_same_memory(two: Path) -> None:
    first, second = (load(two, "crd", rank)["banks"] for rank in range(2))
    assert first.keys() == {"objective.terms.crd.bank_s", "objective.terms.crd.bank_t"}
    for name, bank in first.items():
        torch.testing.assert_close(second[name], bank)


@pytest.mark.slow
def test_sharded_weights_are_saved_whole(two: Path) -> None:
    found = load(two, "hint_hidden-sharded")
    assert set(found["sharded"]) >= {name for name in found["weights"] if name.endswith("weight")}
    assert "objective.terms.hint.projectors.0.weight" in found["sharded"]
    assert not any(hasattr(tensor, "full_tensor") for tensor in found["weights"].values())
