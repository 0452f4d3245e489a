"""Ctrl-C ends every command in one line."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

COMMANDS = {
    "kd-eval": ("cli.evaluate", "export.load.load_model", ["run"]),
    "kd-predict": ("cli.predict", "export.load.load_model", ["run", "a text"]),
    "kd-export": ("cli.export", "export.write.plan", ["run", "--format", "onnx", "--out", "out"]),
    "kd-benchmark": ("cli.benchmark", "export.benchmark.subjects_of", ["run"]),
    "kd-report": ("cli.report", "evaluation.report.sweep.report_sweep", ["sweep"]),
    "kd-cache": ("cli.cache", "teachers.cache.upkeep.verify", ["verify", "cache"]),
}
"""Of each: its module, what it calls in the midst of its work, and arguments."""


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_ends_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    module, working, arguments = COMMANDS[name]
    main = importlib.import_module(f"kd_lightning.{module}").main
    place, _, function = working.rpartition(".")
    importlib.import_module(f"kd_lightning.{place}")
    monkeypatch.setattr(f"kd_lightning.{place}.{function}", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 130
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: interrupted; ")
