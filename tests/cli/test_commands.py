"""The commands as a user types them: quick to react, one line for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks

BIN = Path(sys.executable).parent


def installed(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, imports and all."""
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]], capture_output=True, text=True, cwd=cwd, input=stdin, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "experiment=quickstart"]])
def test_help_and_config_are_printed_without_importing_torch(arguments: list[str], tmp_path: Path) -> None:
    result = installed("kd-train", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert ("temperature=2.0  (a number or" if "--help" in arguments else "temperature: 2.0") in result.stdout
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kd_lightning.cli.train", *arguments],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    imported = {line.rsplit("|", 1)[-1].strip() for line in listing.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "transformers", "pandas", "matplotlib"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["temprature=3"], "kd-train: temprature: there is no such key; did you mean 'temperature'"),
        (["trainer.max_epoch=3"], "trainer.max_epoch: there is no such key; did you mean 'trainer.max_epochs'"),
        (["modle@student=bilstm"], "did you mean 'model"),
        (["distillation=soft_targets"], "soft_target"),
        (["data=text_files"], "kd-train: data.train_file needs a value"),
        (["temperature=-1"], "kd-train: temperature=-1 must be above 0"),
        (["data=text_files", "data.train_file=nowhere.csv"], "nowhere.csv: no such file"),
        (["trainer=ddp", "trainer.strategy=ddp"], "use trainer=ddp (ddp_spawn) on one machine"),
        (["logger=null"], "logger is a group of settings and takes the name of a choice; valid: default, mlflow"),
        (["model=transformer"], "model=transformer: whose? model@student=transformer is the student"),
        (["name=a=b"], "name=a=b: cannot be read"),
        (["name={x"], """write a value with special characters as "name='{x'\""""),
        (["=3"], "one of KEY=VALUE names no key"),
        (["alpha=''"], "could not convert string to float"),  # found inside of Hydra's job
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments: list[str], says: str, tmp_path: Path) -> None:
    # Whether an import says something too is seen where a process imports everything.
    run = installed if arguments == ["temperature=-1"] else forks.command
    result = run("kd-train", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["kd-predict", "kd-eval"])
def test_a_folder_without_a_run_is_one_line(name: str, tmp_path: Path) -> None:
    result = forks.command(name, str(tmp_path / "none"), *(["a text"] if name == "kd-predict" else []), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{name}: ")
    assert "no finished student" in result.stderr
    assert "Traceback" not in result.stderr


def test_predict_without_sentences_is_one_line(tmp_path: Path) -> None:
    result = forks.command("kd-predict", str(tmp_path), cwd=tmp_path, stdin="\n  \n")
    assert result.returncode == 2
    assert result.stderr.strip() == "kd-predict: no sentences: every line is empty"
