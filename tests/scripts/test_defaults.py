"""scripts/defaults.py makes runs that fit the configuration, and draws what was measured of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.resolvers import register_resolvers
from tests import ROOT


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("defaults")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "RESULT", tmp_path / "defaults.json")
    return module


def test_every_run_composes_in_a_folder_of_its_own(defaults: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra import compose, initialize_config_dir

    from kd_lightning.pipeline.validation import validate

    register_resolvers()
    runs: dict[Path, list[str]] = {}
    monkeypatch.setattr(defaults, "report_of", lambda settings, folder: runs.setdefault(folder, settings))
    for name in defaults.names():
        defaults.train(name, "standard", 3)
    assert len(runs) == len(defaults.names())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for settings in runs.values():
            validate(compose("config", settings))


def test_the_picture_has_a_line_a_model_over_the_numbers_of_labels(
    defaults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"reviews, 300 labels": 300, "reviews": 7397, "debian_sections, 10,000 labels": 10_000, "sotu_eras": 900}
    rows = {
        f"{name}/small": {
            "splits": {"train": labels},
            **{model: {"mean": 0.5 + 0.1 * i, "std": None} for i, model in enumerate(defaults.MODELS)},
        }
        for name, labels in counts.items()
    }
    defaults.RESULT.write_text(json.dumps({"standard": rows}))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, place, **_: drawn.append(figure))
    defaults.picture()
    reviews, debian = drawn[0].axes
    lines = {group.get_label(): list(group[0].get_xdata()) for group in reviews.containers}
    assert lines == {line: [300, 7397] for line, _ in defaults.LINES.values()}
    heights = {group.get_label(): list(group[0].get_ydata()) for group in debian.containers}
    assert heights["teacher"] == [pytest.approx(50)]
    assert heights["labels alone"] == [pytest.approx(60)]
