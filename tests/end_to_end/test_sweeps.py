"""Sweeps: presets, folders, failures that do not stop the rest, what points share, and the report at the end."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.resolvers import register_resolvers
from tests import ROOT, forks
from tests.conftest import tiny_overrides, write_toy_csv

Run = Callable[..., subprocess.CompletedProcess[str]]
WITHOUT_PLUGINS = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith(("hydra_plugins", "optuna")):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
sys.argv[0] = "kd-train"
from kd_lightning.cli.train import main
main()
"""


@pytest.fixture
def kd_train(tmp_path: Path) -> Run:
    def run(*overrides: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {"KD_LIGHTNING_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        if code is None:
            return forks.command("kd-train", *overrides, cwd=tmp_path, environment=environment, limit=600)
        return subprocess.run(
            [sys.executable, "-c", code, *overrides], cwd=ROOT, env={**os.environ, **environment},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


def record(folder: Path, name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / name).read_text())
    return content


def points(sweep: Path, file: str) -> list[Path]:
    return sorted(found.parent for found in sweep.glob(f"*/{file}"))


def test_presets_compose() -> None:
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        grid = compose("config", overrides=["sweep=temperature_alpha"], return_hydra_config=True).hydra
        assert grid.mode.name == "MULTIRUN"
        assert dict(grid.sweeper.params) == {"temperature": "1,2,4,8", "alpha": "0.1,0.5,0.9"}
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweep` is not installed")
        search = compose("config", overrides=["sweep=optuna"], return_hydra_config=True).hydra
        assert search.sweeper.sampler._target_ == "optuna.samplers.TPESampler"
        assert search.sweeper.direction == "maximize"
        assert search.sweeper.max_failure_rate == 1.0
        assert list(search.sweeper.params) == ["temperature", "alpha", "optimizer.lr"]
        assert search.sweeper.storage is None


def test_without_the_plugin_one_line_names_the_extra(kd_train: Run) -> None:
    result = kd_train("sweep=optuna", code=WITHOUT_PLUGINS)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "pip install 'kd-lightning[sweep]'" in line


def test_strategies_students_and_seeds_have_folders_of_their_own(kd_train: Run, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    choices = ("model@student=bilstm,lstm_student", "distillation=soft_target,dkd", "seed=0,1")
    result = kd_train("-m", *choices, "alpha=7", f"run_dir={sweep}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("kd-train: alpha=7 must be between 0")
    names = {point.name for point in points(sweep, "failure.json")}
    assert names == {
        f"alpha=7,distillation={strategy},model_student={student},seed={seed}"
        for strategy in ("soft_target", "dkd")
        for student in ("bilstm", "lstm_student")
        for seed in (0, 1)
    }
    failure = record(sweep / sorted(names)[0], "failure.json")
    assert str(failure["error"]).startswith("alpha=7 must be between 0")
    assert "0 points finished, 8 failed, 0 unfinished." in result.stdout, "the report ends a sweep that failed too"
    assert "alpha=7 must be between 0" in (sweep / "report.html").read_text()


def test_a_preset_needs_no_flag_and_a_points_command_is_no_sweep(kd_train: Run, tmp_path: Path) -> None:
    result = kd_train("sweep=temperature_alpha", "alpha=7", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert result.returncode == 2
    found = points(tmp_path / "sweep", "failure.json")
    assert {point.name for point in found} == {f"alpha=7,temperature={temperature}" for temperature in (1, 2, 4, 8)}
    commands = {str(record(point, "overrides.json")["command"]) for point in found}
    parts = [re.fullmatch(r"kd-train temperature=(\d) alpha=7 name=(run_\w{6})", command) for command in commands]
    assert {part[1] for part in parts if part} == {"1", "2", "4", "8"}
    assert len({part[2] for part in parts if part}) == 4, "each would have a folder of its own"


def test_processes_that_would_run_the_sweep_again_are_refused_with_the_remedy(kd_train: Run, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    result = kd_train("-m", "trainer=ddp", "trainer.strategy=ddp", "temperature=1,2", f"hydra.sweep.dir={sweep}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    said = result.stderr.splitlines()[-1]
    assert said.startswith("kd-train: trainer.strategy=ddp with 2 processes would start the whole command (in a sweep")
    assert "use trainer=ddp (ddp_spawn) on one machine, or start one process a device yourself: torchrun" in said
    assert len(points(sweep, "failure.json")) == 2, "no child ran a point of its own"


def test_a_search_goes_on_after_points_that_failed(kd_train: Run, tmp_path: Path) -> None:
    """The study is in memory. No alpha above 1 is a weight."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweep` is not installed")
    sweep = tmp_path / "sweep"
    result = kd_train(
        "sweep=optuna", "alpha=interval(1.5,2)", "hydra.sweeper.n_trials=3", f"run_dir={sweep}", "seed=3"
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "kd-train: every point of this search failed: see the report"
    failed = points(sweep, "failure.json")
    assert len(failed) == 3
    assert all(str(record(point, "failure.json")["error"]).startswith("alpha=1.") for point in failed)
    assert {record(point, "overrides.json")["sweeper"] for point in failed} == {"OptunaSweeper"}
    assert "0 points finished, 3 failed, 0 unfinished." in result.stdout


@pytest.mark.slow
def test_a_failing_point_does_not_stop_the_rest_and_finished_ones_are_kept(kd_train: Run, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    own = [*tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path / "alone"), f"hydra.sweep.dir={sweep}"]
    first = kd_train("-m", *own, "temperature=1,4", "alpha=0.5,2", "seed=0")
    assert first.returncode == 2
    assert first.stderr.splitlines()[-1].startswith("kd-train: alpha=2 must be between 0")
    failed, finished = points(sweep, "failure.json"), points(sweep, "score.json")
    assert (len(failed), len(finished)) == (2, 2)
    assert {record(point, "failure.json")["type"] for point in failed} == {"ConfigError"}
    assert all("alpha=0.5" in record(point, "overrides.json")["overrides"] for point in finished)
    assert "2 points finished, 2 failed, 0 unfinished." in first.stdout

    students = {point: (point / "seed_0/distill/model.safetensors").stat().st_mtime_ns for point in finished}
    shared = {file: file.stat().st_mtime_ns for file in (sweep / "shared").glob("*/model.safetensors")}
    assert sorted(file.parent.name.split("-")[0] for file in shared) == ["baseline", "teacher"], "each trained once"
    for point in finished:
        assert (point / "teacher").resolve() in {file.parent for file in shared}
        assert (point / "seed_0/baseline").resolve() in {file.parent for file in shared}

    kept = {folder: sorted((tmp_path / "home" / folder).glob("*/*")) for folder in ("tokens", "teacher_outputs")}
    assert {folder: len({file.parent for file in files}) for folder, files in kept.items()} == {
        "tokens": 1, "teacher_outputs": 1,
    }, "one tokenisation, one pass of the teacher"  # fmt: skip
    stamps = {file: file.stat().st_mtime_ns for files in kept.values() for file in files}

    second = kd_train("-m", *own, "temperature=1", "alpha=0.5,0.9", "seed=0,1")
    assert second.returncode == 0, second.stderr
    assert {point: (point / "seed_0/distill/model.safetensors").stat().st_mtime_ns for point in finished} == students
    assert {file: file.stat().st_mtime_ns for file in shared} == shared, (
        "neither teacher nor baseline was trained again"
    )
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps, "nothing was read or predicted again"
    now = [folder.name.split("-")[0] for folder in (sweep / "shared").iterdir() if folder.is_dir()]
    assert sorted(now) == ["baseline", "baseline", "teacher"], "one baseline for each seed"
    document = record(sweep, "sweep.json")
    assert len(points(sweep, "score.json")) == 5
    scores = [record(point, "score.json")["score"] for point in points(sweep, "score.json")]
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in scores)
    assert document["chosen"]["values"].keys() == {"temperature", "alpha"}  # type: ignore[attr-defined]

    command = shlex.split(str(record(finished[0], "overrides.json")["command"]))
    assert command[0] == "kd-train"
    alone = kd_train(*command[1:], f"run_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    weights = [load_file(run / "seed_0/distill/model.safetensors") for run in (tmp_path / "alone", finished[0])]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), f"{name}: the point's own command makes other weights"


@pytest.mark.slow
def test_optuna_searches_and_a_study_goes_on(kd_train: Run, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweep` is not installed")
    import optuna

    storage, sweep = f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "sweep"
    tiny = tiny_overrides(write_toy_csv(tmp_path / "toy.csv"), tmp_path / "alone")
    own = [override for override in tiny if not override.startswith("optimizer.lr")]
    own += ["sweep=optuna", "stages=[teacher,distill]", f"hydra.sweep.dir={sweep}"]
    own += [f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=toy", "alpha=interval(0,1.2)"]
    first = kd_train(*own, "hydra.sweeper.n_trials=3")
    assert first.returncode == 0, first.stderr
    study = optuna.load_study(study_name="toy", storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert study.trials[2].params["alpha"] > 1
    assert sorted(trial.value for trial in study.trials[:2]) == sorted(
        float(str(record(point, "score.json")["score"])) for point in points(sweep, "score.json")
    )
    assert "2 points finished, 1 failed, 0 unfinished." in first.stdout
    document = record(sweep, "sweep.json")
    assert [entry["name"] for entry in document["parameters"]] == ["temperature", "alpha", "optimizer.lr"]  # type: ignore[attr-defined]
    assert (sweep / "parallel.png").is_file()

    again = kd_train(*own, "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=null")
    assert again.returncode == 0, again.stderr
    study = optuna.load_study(study_name="toy", storage=storage)
    assert len(study.trials) == len(points(sweep, "score.json")) + len(points(sweep, "failure.json")) == 5
    values = [trial.value for trial in study.trials if trial.value is not None]
    assert study.best_value == max(values), "the best is the highest score"
    assert len(list((sweep / "shared").glob("teacher-*/stage.json"))) == 1
