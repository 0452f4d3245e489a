"""What ends a stage's training."""

from __future__ import annotations

from io import StringIO
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kd_lightning.training import fit


def said(finish: Any) -> str:
    output = StringIO()
    logger: Any = SimpleNamespace(experiment=SimpleNamespace(finish=finish))
    training: Any = SimpleNamespace(name="distill")
    fit._finish(logger, training, Console(file=output, width=200))
    return output.getvalue()


def test_a_stage_does_not_wait_for_wandb_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "PATIENCE", 0.1)
    over, ended = Event(), []
    assert "distill  its W&B run is not finished: not done after 0.1 s" in said(lambda: over.wait(60))
    over.set()
    assert said(lambda: ended.append(1)) == ""
    assert ended == [1]


def test_what_wandb_raises_is_a_line() -> None:
    def fail() -> None:
        raise ConnectionError("no route\nto host")

    assert said(fail) == "distill  its W&B run is not finished: no route\n"
