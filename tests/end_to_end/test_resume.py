"""A run that is killed goes on, mid-epoch, to the very weights of one that was not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forks
from tests.conftest import tiny_overrides, write_toy_csv

SETTINGS = [
    "stages=[teacher,distill]", "trainer.max_steps=63", "data.views=1", "student.dropout=0.3",
    "checkpoint_every_n_steps=7", "+callbacks.kill={_target_: tests.killer.KillAt, stage: distill}",
]  # fmt: skip
"""21 steps an epoch of the pool, 63 in all; validation at 31 and 62."""


def kd_train(home: Path, *overrides: str, kill_at: int = -1) -> int:
    environment = {"KD_LIGHTNING_HOME": str(home), "OMP_NUM_THREADS": "1", "KILL_AT_STEP": str(kill_at)}
    result = forks.command("kd-train", *overrides, cwd=home.parent, environment=environment)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make the run that is not interrupted, once for the same settings."""

    @cache
    def train(*more: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        own = tiny_overrides(write_toy_csv(folder / "toy.csv"), folder / "whole")
        assert kd_train(folder / "home", *own, *SETTINGS, *more) == 0
        return folder / "whole"

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "more"),
    [
        (11, ()),  # in the first epoch, which fills the cache of the teacher's outputs
        (26, ()),  # in the middle of the second epoch, after the checkpoint of step 21 = the end of the first
        (33, ("checkpoint_every_n_steps=31",)),  # the checkpoint falls on a step that also looks at validation
        (17, ("trainer.accumulate_grad_batches=2", "checkpoint_every_n_steps=5")),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    step: int, more: tuple[str, ...], whole: Callable[..., Path], tmp_path: Path
) -> None:
    killed = [*tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path / "killed"), *SETTINGS, *more]
    home, uninterrupted = tmp_path / "home of the killed", whole(*more)
    assert kd_train(home, *killed, kill_at=step) == -signal.SIGKILL
    folder = tmp_path / "killed" / "seed_0" / "distill"
    assert (folder / "checkpoints" / "resume.ckpt").is_file()
    assert not (folder / "stage.json").exists()
    assert kd_train(home, *killed) == 0

    reference = load_file(uninterrupted / "seed_0" / "distill" / "model.safetensors")
    resumed = load_file(folder / "model.safetensors")
    assert reference.keys() == resumed.keys()
    for name, tensor in reference.items():
        assert torch.equal(resumed[name], tensor), name
    runs = (uninterrupted, tmp_path / "killed")
    records = [json.loads((run / "seed_0/distill/stage.json").read_text()) for run in runs]
    assert records[0]["steps"] == records[1]["steps"]
    assert records[0]["best_step"] == records[1]["best_step"]
    assert records[0]["validation"] == records[1]["validation"]
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    curves = [report["models"]["distilled"]["curves"][0]["validation_score"] for report in reports]
    assert curves[0] == curves[1], "the learning curve survives the kill"
