"""A whole run on the device: teacher, baseline, distilled student, report; read back on a machine without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_lightning.training.run_folder import load_run
from tests import ROOT
from tests.conftest import tiny_overrides, write_toy_csv
from tests.gpu.conftest import DEVICE

pytestmark = pytest.mark.gpu
ON_GPU = DEVICE.type == "cuda"
TRAINER = ["trainer=gpu" if ON_GPU else "trainer=cpu"]


def run(tmp_path: Path, *command: str, hide_gpu: bool = False) -> str:
    environment = {**os.environ, "KD_LIGHTNING_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


HALF = ("16-mixed", "float16") if ON_GPU else ("bf16-mixed", "bf16")
LIVE = [
    "model@student=transformer", "student.hidden_size=32", "student.intermediate_size=64", "compile=true",
    "teacher.cache=off", f"trainer.precision={HALF[0]}", f"teacher.precision={HALF[1]}",
]  # fmt: skip


@pytest.mark.parametrize("own", [[], LIVE], ids=["cached", "live and ahead, in 16 bits, student compiled"])
def test_a_run_from_teacher_to_report(own: list[str], tmp_path: Path) -> None:
    tiny = tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path / "run")
    if own:
        tiny = [one for one in tiny if not one.startswith(("model@student", "student.", "teacher.precision"))]
        own = [*own, "optimizer.lr=0.003"]
    said = run(tmp_path, "kd_lightning.cli.train", *tiny, *TRAINER, *own)
    assert "report:" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert bool(report["environment"]["cuda_devices"]) == ON_GPU
    for model in report["models"].values():
        assert all(math.isfinite(score["mean"]) for score in model["test"].values())
    assert report["models"]["teacher"]["test"]["accuracy"]["mean"] > 0.5, "three classes, told apart by a word"
    assert {parameter.device.type for parameter in load_run(tmp_path / "run").network.parameters()} == {"cpu"}
    predicted = run(
        tmp_path, "kd_lightning.cli.predict", str(tmp_path / "run"), "goal match team", "--json", hide_gpu=True
    )
    assert json.loads(predicted.splitlines()[0])["label"] in ("运动", "science", "food")
