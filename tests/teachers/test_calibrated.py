"""The temperature that fits a teacher to validation, and who reads its logits divided by it."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.serving import Serving
from kd_lightning.pipeline.teacher_provider import TeacherProvider
from kd_lightning.runtime import memoize
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.tasks import Classification
from kd_lightning.teachers import CalibratedTeacher, FrozenTeacher, Teacher, fit_temperature
from kd_lightning.types import IGNORE, Batch, ModelOutput
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


def provided(calibrate: bool | str, logits: torch.Tensor, labels: torch.Tensor) -> tuple[Teacher, str]:
    """Return what a run's teacher of these outputs becomes, and what is said."""
    batch = {"index": torch.arange(len(labels)), "labels": labels, "logits": logits}
    data: Any = SimpleNamespace(task=Classification(logits.shape[1]), val_dataloader=lambda: [batch])
    said = StringIO()
    serving = Serving(calibrate=calibrate, cache_top_k=None)  # type: ignore[arg-type]
    provider = TeacherProvider(serving, data, lambda: None, torch.device("cpu"), Console(file=said))  # type: ignore[arg-type, return-value]
    found = [provider.calibrated(Outputs()) for _ in range(2)]
    assert type(found[0]) is type(found[1])
    return found[0], said.getvalue()


class Outputs(Teacher):
    """Outputs the logits that the batch has."""

    def __call__(self, batch: Batch) -> ModelOutput:
        return ModelOutput(batch["logits"])

    def to(self, device: torch.device) -> Outputs:
        return self


def test_auto_divides_where_the_probabilities_are_badly_wrong_and_says_so_once() -> None:
    torch.manual_seed(0)
    labels = torch.randint(3, (400,))
    right = torch.rand(400) < 0.8
    answers = torch.where(right, labels, (labels + 1) % 3)
    sure, fitting = (scale * torch.nn.functional.one_hot(answers, 3).float() for scale in (9.0, 2.1))
    teacher, said = provided("auto", sure, labels)
    assert isinstance(teacher, CalibratedTeacher)
    assert teacher.temperature == pytest.approx(fit_temperature(sure, labels))
    assert said.count("calibrated: logits divided by") == 1
    assert "ECE" in said
    for calibrate, logits in (("auto", fitting), (False, sure)):
        teacher, said = provided(calibrate, logits, labels)
        assert isinstance(teacher, Outputs)
        assert not said


def test_auto_leaves_a_teacher_whose_error_may_be_chance() -> None:
    logits = torch.tensor([[1.4, 0.0]] * 10)  # 0.8 for the first class, which 6 of 10 are: an ECE of 0.1 and more
    labels = torch.tensor([0] * 6 + [1] * 4)
    teacher, _ = provided("auto", logits, labels)
    assert isinstance(teacher, Outputs)
    teacher, _ = provided("auto", logits.repeat(20, 1), labels.repeat(20))
    assert isinstance(teacher, CalibratedTeacher)


def test_what_excludes_it(composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path) -> None:
    base = [*tiny_overrides(toy_csv, tmp_path / "run"), "teacher.calibrate=true", "stages=[distill]"]
    with pytest.raises(ConfigError, match=r"teacher\.ema=0\.9.*teacher\.calibrate"):
        Run(composed(*base, "teacher.ema=0.9"))
    shards = ["trainer=fsdp2", "trainer.devices=2", "teacher.sharded=true", "teacher.cache=off"]
    with pytest.raises(ConfigError, match=r"teacher\.sharded=true.*set teacher\.calibrate=false"):
        Run(composed(*base, *shards))
