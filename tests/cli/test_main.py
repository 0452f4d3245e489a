"""`kd COMMAND` is the command itself, and `kd --help` lists them all at once."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kd_lightning.cli.__main__ import commands, main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_every_command_has_a_script_of_its_own_that_runs_the_same_module() -> None:
    assert {f"kd-{name}": f"{module}:main" for name, (module, _) in commands().items()} == {
        name: place for name, place in SCRIPTS.items() if name != "kd"
    }
    assert len(commands()) == 12
    for place in SCRIPTS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command_in_a_line_and_imports_nothing_heavy(option: str, tmp_path: Path) -> None:
    result = python("-X", "importtime", "-m", "kd_lightning.cli", option, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name, (_, about) in commands().items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(f"  {about}")
        assert len(line) <= 120
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "hydra", "omegaconf", "lightning", "transformers", "numpy", "rich"}


def test_without_a_command_the_help_is_printed_as_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kd"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "usage: kd COMMAND" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kd", "trian", "temperature=2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "kd: trian: there is no such command; did you mean 'train'?\n"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["--help"]),
        ("train", ["temprature=3"]),
        pytest.param("cli", ["--help"], marks=pytest.mark.slow),
        ("slurm", ["status", "none"]),
    ],
)
def test_a_command_says_and_returns_the_same_under_both_names(name: str, arguments: list[str], tmp_path: Path) -> None:
    one = python("-m", "kd_lightning.cli", name, *arguments, cwd=tmp_path)
    other = python("-m", commands()[name][0], *arguments, cwd=tmp_path)
    assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
    assert one.returncode == (0 if arguments == ["--help"] else 2)
    assert one.stdout or one.stderr.startswith(f"kd-{name}: ")


def test_a_command_is_the_main_module_whose_name_further_processes_are_started_by(tmp_path: Path) -> None:
    """Lightning's subprocess launcher and `multiprocessing` start `__main__.__spec__.name` with `sys.argv[1:]`."""
    (tmp_path / "seen.py").write_text(
        "import sys\n"
        "from kd_lightning.cli import runner\n"
        "runner.trust_option = lambda parser: print(sys.modules['__main__'].__spec__.name, sys.argv[1:])\n"
        "sys.argv = ['kd', 'export', '--help']\n"
        "from kd_lightning.cli.__main__ import main\n"
        "main()\n"
    )
    result = python("seen.py", cwd=tmp_path)
    assert result.stdout.splitlines()[0] == "kd_lightning.cli.export ['--help']"
