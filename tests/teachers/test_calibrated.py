"""The temperature that fits a teacher to validation, and who reads its logits divided by it."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime import memoize
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.teachers import CalibratedTeacher, FrozenTeacher, fit_temperature
from kd_lightning.types import IGNORE
from tests.conftest import tiny_overrides
from tests.whole_split import outputs_of


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_it_is_the_minimum(scale: float) -> None:
    torch.manual_seed(0)
    logits = scale * torch.randn(500, 4)
    labels = torch.distributions.Categorical(logits=logits / scale).sample()
    found = fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda t: float(cross_entropy(logits.double() / t, labels)), bounds=(0.05, 20), method="bounded"
    )
    assert found == pytest.approx(best.x, rel=1e-3)
    assert found == pytest.approx(scale, rel=0.25)  # the labels are drawn at the temperature `scale`
    labels[::2] = IGNORE
    assert fit_temperature(logits, labels) == fit_temperature(logits[1::2], labels[1::2])


def test_its_bounds() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(1 / 20)  # never wrong
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(20)  # always
    with pytest.raises(ConfigError, match=r"teacher\.calibrate: there is no labelled example"):
        fit_temperature(logits, torch.tensor([IGNORE, IGNORE]))


def test_a_run_with_a_calibrated_teacher(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    memoize._KEPT.clear()
    said = StringIO()
    base = [*tiny_overrides(toy_csv, tmp_path / "run"), "teacher.calibrate=true", "stages=[teacher,distill]"]
    pipeline = Run(composed(*base), Console(file=said))
    train_all(pipeline)
    assert "calibrated: logits divided by" in said.getvalue()
    temperature = read_json(tmp_path / "run" / "seed_0" / "distill" / "stage.json")["teacher_temperature"]
    data = pipeline.data.select(tokens="teacher")
    raw = outputs_of(FrozenTeacher(pipeline.teacher.network), data.val_dataloader())
    assert temperature == pytest.approx(fit_temperature(raw.logits, raw.labels), rel=1e-4)
    asked = pipeline.predicting_teacher
    assert isinstance(asked, CalibratedTeacher)
    assert abs(temperature - 1) > 0.05
    divided = outputs_of(asked, data.test_dataloader()).logits
    plain = outputs_of(FrozenTeacher(pipeline.teacher.network), data.test_dataloader()).logits
    torch.testing.assert_close(divided, plain / temperature, rtol=1e-4, atol=1e-5)


def test_what_excludes_it(composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path) -> None:
    base = [*tiny_overrides(toy_csv, tmp_path / "run"), "teacher.calibrate=true", "stages=[distill]"]
    with pytest.raises(ConfigError, match=r"teacher\.ema=0\.9.*teacher\.calibrate"):
        Run(composed(*base, "teacher.ema=0.9"))
    shards = ["trainer=fsdp2", "trainer.devices=2", "teacher.sharded=true", "teacher.cache=off"]
    with pytest.raises(ConfigError, match=r"teacher\.sharded=true.*set teacher\.calibrate=false"):
        Run(composed(*base, *shards))
