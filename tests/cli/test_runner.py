"""How a command ends: one line and an exit code by what stopped it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from kd_lightning.cli.hydra_errors import explain
from kd_lightning.cli.runner import command
from kd_lightning.runtime.errors import CacheError, ConfigError, DataError, Diverged, Interrupted, KDError


def raising(error: BaseException, **options: Any) -> Callable[[], None]:
    @command("kd-thing", "nothing was changed", **options)
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (KDError("x"), 1),
        (CacheError("x"), 1),
        (Diverged("x"), 1),
        (Interrupted("x"), 1),
        (OSError(28, "No space left on device", "file"), 1),
    ],
)
def test_the_class_of_an_error_decides_the_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raising(error)()
    assert ended.value.code == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("kd-thing: ")
    assert str(ended.value) == line


def test_ctrl_c_says_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raising(KeyboardInterrupt())()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "kd-thing: interrupted; nothing was changed\n"


def test_a_defect_is_raised_and_an_exit_passes() -> None:
    with pytest.raises(ValueError, match="a defect"):
        raising(ValueError("a defect"))()
    with pytest.raises(SystemExit) as ended:
        raising(SystemExit(7))()
    assert ended.value.code == 7


def test_of_several_processes_that_fail_alike_the_first_prints_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kd_lightning.cli.runner.rank", lambda: 1)
    with pytest.raises(SystemExit) as ended:
        raising(ConfigError("alpha=2"), first_only=True)()
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        raising(ConfigError("alpha=2"))()
    assert capsys.readouterr().err == "kd-thing: alpha=2\n"


def test_the_interpreter_prints_the_line_once_and_ends_with_the_code() -> None:
    program = (
        "from kd_lightning.cli.runner import command\n"
        "from kd_lightning.runtime.errors import ConfigError\n"
        "with command('kd-thing', ''): raise ConfigError('alpha=2')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "kd-thing: alpha=2\n")


@pytest.mark.parametrize(("name", "kind"), [("ConfigError", ConfigError), ("Diverged", Diverged)])
def test_an_error_of_a_spawned_process_keeps_its_class(name: str, kind: type[KDError]) -> None:
    """torch hands over the traceback as text."""
    raised = type("ProcessRaisedException", (Exception,), {})
    error = explain(raised(f"Traceback (most recent call last):\n  ...\n{kind.__module__}.{name}: lr=1"), [])
    assert type(error) is kind
    assert str(error) == "lr=1"
    assert explain(raised("Traceback (most recent call last):\nValueError: a defect"), []) is None


def test_a_search_without_a_finished_point_is_a_failure_and_no_mistake() -> None:
    error = explain(ValueError("No trials are completed yet."), [])
    assert type(error) is KDError
