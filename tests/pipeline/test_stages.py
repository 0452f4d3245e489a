"""The stages of a run, as data: which there are, and of how many steps."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.stages import LONG, plan
from tests.conftest import tiny_overrides

Composed = Callable[..., DictConfig]


@pytest.fixture
def steps(composed: Composed, toy_csv: Path, tmp_path: Path, own_home: Path) -> Callable[..., dict[str, int]]:
    """Return the steps of each stage by its path; 168 labelled examples in batches of 16."""

    def planned(*overrides: str, student: str = "") -> dict[str, int]:
        base = tiny_overrides(toy_csv, tmp_path / "run")
        if student:
            base = [*(one for one in base if "student" not in one), f"model@student={student}"]
        run = Run(composed(*base, *overrides), Console(file=StringIO()))
        assert run.data.labelled_examples == 168
        return {stage.path: stage.steps for stage in plan(run)}

    return planned


def test_epochs_are_those_of_the_labelled_examples(steps: Callable[..., dict[str, int]]) -> None:
    alone = steps()
    assert alone == {"teacher": 6 * 6, "seed_0/baseline": 2 * 11, "seed_0/distill": 2 * 11}
    assert steps("data.views=3", "teacher.cache_views=2") == alone


def test_the_budget_decides_what_is_auto(steps: Callable[..., dict[str, int]]) -> None:
    auto = ["trainer.max_epochs=auto", "teacher.trainer.max_epochs=auto", "budget=quick"]
    found = steps(*auto)
    assert found["teacher"] == 12 * 6
    assert found["seed_0/distill"] == 96_000 // 16
    assert steps(*auto, "trainer.accumulate_grad_batches=4")["seed_0/distill"] == 96_000 // 64
    assert steps(*auto, "trainer.max_steps=5")["seed_0/distill"] == 5


def test_a_long_baseline_is_trained_for_a_quarter_of_its_steps_too(steps: Callable[..., dict[str, int]]) -> None:
    last = LONG * 168 // 16
    assert "seed_0/baseline_short" not in steps(f"trainer.max_steps={last}")
    found = steps(f"trainer.max_steps={last + 1}", "stages=[teacher,baseline,distill,finetune]")
    assert found["seed_0/baseline"] == last + 1
    assert found["seed_0/baseline_short"] == -(-(last + 1) // 4)
    assert found["seed_0/finetune"] == 11
    more = steps(f"trainer.max_steps={last + 1}", student="embeddings_from_teacher")
    assert {"seed_0/baseline_initialised", "seed_0/baseline_initialised_short"} < set(more)
