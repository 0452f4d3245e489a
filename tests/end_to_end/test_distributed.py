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

from tests import ROOT, ranks

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Of weights around 0.1 that two epochs of float32 moved by as much: sums are taken in another order, no more."""
IN_16_BITS = {"bf16_mixed": {"rtol": 0.0, "atol": 2e-3}, "bf16_true": {"rtol": 0.0, "atol": 2e-2}}
"""Where every product of matrices, or every weight after a step (up to 2), is rounded to 8 bits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def launch(folder: Path, *what: str) -> None:
    """Run `tests.ranks` in two processes, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder), *what], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Run all trainings in two processes; what they came to is in the folder returned."""
    launch(folder)
    return folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    """How far the weights of each strategy are from each other, sharded and whole."""
    folder = tmp_path_factory.mktemp("strategies")
    launch(folder, "strategies")
    found: dict[tuple[str, str], float] = torch.load(folder / "strategies.0.pt", weights_only=True)
    return found


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
    near = IN_16_BITS.get(name, TOLERANCE)
    for key, tensor in one["weights"].items():
        torch.testing.assert_close(both["weights"][key], tensor, **near, msg=lambda m, k=key: f"{k}: {m}")
    assert one["metrics"].keys() == both["metrics"].keys()
    assert both["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5 if near is TOLERANCE else 1e-3)


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
@pytest.mark.parametrize("file", ["overflowing", "overflowing-sharded"])
def test_a_step_that_overflows_is_left_out_and_counted_by_all(
    file: str, two: Path, alone: dict[str, dict[str, Any]]
) -> None:
    """Also by a process that holds no part of the gradient."""
    if "overflowing" not in alone:
        alone["overflowing"] = ranks.train("overflowing", two)
    assert [load(two, file, rank)["skipped"] for rank in range(2)] == [alone["overflowing"]["skipped"]] * 2
    assert alone["overflowing"]["skipped"] > 0


@pytest.mark.slow
def test_sharded_weights_are_saved_whole(two: Path) -> None:
    found = load(two, "hint_hidden-sharded")
    assert set(found["sharded"]) >= {name for name in found["weights"] if name.endswith("weight")}
    assert "objective.terms.hint.projectors.0.weight" in found["sharded"]
    assert not any(hasattr(tensor, "full_tensor") for tensor in found["weights"].values())


@pytest.mark.slow
def test_a_sharded_training_that_is_begun_again_comes_to_the_same_weights(two: Path) -> None:
    whole, resumed = load(two, "hint_hidden-sharded"), load(two, "resumed-sharded")
    for name, tensor in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_a_shared_teacher_teaches_what_a_whole_one_does_with_half_of_it_on_each(two: Path) -> None:
    whole, shared = load(two, "hint_hidden-sharded"), load(two, "shared_teacher-sharded")
    for name, tensor in whole["weights"].items():
        assert torch.equal(shared["weights"][name], tensor), name
    assert shared["weights"].keys() == whole["weights"].keys(), "nothing of the teacher is saved"
    assert all(here == size for here, size in whole["teacher"].values())
    parts = [load(two, "shared_teacher-sharded", rank)["teacher"] for rank in range(2)]
    assert parts[0].keys() == whole["teacher"].keys()
    for name, (here, size) in parts[0].items():
        assert here + parts[1][name][0] == size, name
    here, size = (sum(one) for one in zip(*parts[0].values(), strict=True))
    assert size / 2 <= here < 0.51 * size


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), ranks.EACH)
def test_every_strategy_trains_alike_with_student_and_teacher_sharded(
    name: str, kind: str, apart: dict[tuple[str, str], float]
) -> None:
    # Adam leaves out what has no gradient in a step where it is whole, and counts the step where it is shared out.
    assert apart[name, kind] < (1e-3 if name == "hidden_then_logits" else 2e-6)
