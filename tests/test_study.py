"""scripts/study.py makes runs that fit the configuration, and says what their figures say."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.config import conf_dir, register_resolvers
from tests.toy_reviews import write_archive

ROOT = Path(__file__).parent.parent
TRAINED = ["data_efficiency", "label_noise", "sensitivity", "architecture_gap", "teacher_quality", "calibration"]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("study")
    for name, folder in (("RUNS", tmp_path / "runs"), ("RESULTS", tmp_path / "results")):
        monkeypatch.setattr(module, name, folder)
    archive = write_archive(tmp_path / "archive", movies=120, others=30)
    monkeypatch.setattr("kd_lightning.data.reviews.fetch", lambda name: archive)
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "pipeline", lambda settings: type("Run", (), {"data": reviews()}))
    return module


def reviews() -> Any:
    from kd_lightning.data import Reviews

    return Reviews(transfer=["amazon"], tokenizer="wordpiece:400")


@pytest.mark.parametrize("name", TRAINED)
def test_every_point_composes(study: Any, name: str) -> None:
    from hydra import compose, initialize_config_dir

    from kd_lightning.checks import validate

    register_resolvers()
    points = study.STUDIES[name].points()
    folders = [job.folder for point in points for job in study.jobs(name, point)]
    assert len(set(folders)) == len(folders) == 5 * len(points)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for point in points:
            overrides = study.jobs(name, point)[0].overrides
            validate(compose("config", overrides))


def test_what_two_studies_have_in_common_is_trained_once(study: Any) -> None:
    folders = {
        name: {job.folder for point in study.STUDIES[name].points() for job in study.jobs(name, point)}
        for name in ("sensitivity", "calibration")
    }
    assert len(folders["sensitivity"] & folders["calibration"]) == 3 * 5, "three temperatures of the teacher as it is"


def test_fewer_labels_leave_the_rest_to_the_teacher(study: Any) -> None:
    points = {point.x: point for point in study.data_efficiency()}
    files = {x: dict(one.split("=", 1) for one in point.settings if "=" in one) for x, point in points.items()}
    train = {x: Path(found["data.train_file"]).read_text().splitlines()[1:] for x, found in files.items()}
    rest = {x: Path(found["data.transfer"].strip("[]")).read_text().splitlines() for x, found in files.items()}
    assert set(train[10]) < set(train[25]) < set(train[100])
    assert len(train[25]) == round(0.25 * len(train[100]))
    assert {len(train[x]) + len(rest[x]) for x in points} == {len(train[100]) + len(rest[100])}
    assert len({Path(found["data.test_file"]).read_text() for found in files.values()}) == 1


def test_wrong_labels_are_as_many_as_asked_for(study: Any) -> None:
    files = {}
    for point in study.label_noise():
        found = dict(one.split("=", 1) for one in point.settings if "=" in one)
        files[point.x] = Path(found["data.train_file"]).read_text().splitlines()[1:]
    for x, lines in files.items():
        wrong = sum(one != other for one, other in zip(lines, files[0], strict=True))
        assert wrong == round(x / 100 * len(lines))


def curve(*points: tuple[Any, float]) -> list[dict[str, Any]]:
    return [{"x": x, "test": {"mean": mean, "std": 0.01}, "teacher": mean + 0.1} for x, mean in points]


def test_sentences_say_what_the_figures_say(study: Any) -> None:
    said = {name: one.sentence for name, one in study.STUDIES.items()}
    taught = {"labels alone": curve((5, 0.6), (100, 0.8)), "teacher, all sentences": curve((5, 0.81), (100, 0.85))}
    assert said["data_efficiency"](taught).startswith("With a teacher 5 % of the labels are enough")
    taught["teacher, all sentences"] = curve((5, 0.7), (100, 0.75))
    assert "no share of the labels" in said["data_efficiency"](taught)
    noise = {"labels alone": curve((0, 0.8), (40, 0.6)), "soft targets": curve((0, 0.8), (40, 0.7))}
    assert said["label_noise"](noise).endswith("soft targets 10.0, labels alone 20.0.")
    swept = {
        "labels alone": curve((1, 0.6)), "labels, start from the teacher": curve((1, 0.7), (2, 0.75)),
        "T 1": curve((1, 0.74), (2, 0.76)),
    }  # fmt: skip
    assert said["sensitivity"](swept).startswith(
        "1 of 2 settings beat labels from the same start at its best rate (75.0"
    )
    gaps = {"labels alone": curve(("a", 0.7), ("b", 0.7)), "M teaches": curve(("a", 0.75), ("b", 0.69))}
    assert "M to a +5.0, M to b -1.0" in said["architecture_gap"](gaps)
    assert "80.0 teaches 70.0, 90.0 teaches 80.0" in said["teacher_quality"]({"distilled": curve((1, 0.8), (2, 0.7))})
    errors = {"as it is": curve((1, 0.05), (4, 0.02)), "calibrated": curve((1, 0.03), (4, 0.01))}
    assert "between 0.010 (calibrated, T 4) and 0.050 (as it is, T 1)" in said["calibration"](errors)
    budgets = {"fast": curve((5, 0.7), (9, 0.8)), "slow": curve((5, 0.7), (20, 0.79)), "best": curve((5, 0), (30, 0.9))}
    assert ": fast 80.0 % after 9 s, best 90.0 % after 30 s (" in said["stage_budget"](budgets)


def test_pictures_are_drawn(study: Any) -> None:
    study.RESULTS.mkdir()
    study.picture("data_efficiency", {"labels alone": curve((5, 0.6), (100, 0.8))})
    study.picture("architecture_gap", {"labels alone": curve(("BiLSTM", 0.6), ("TextCNN", 0.8))})
    assert {path.name for path in study.RESULTS.iterdir()} == {"data_efficiency.png", "architecture_gap.png"}


def test_no_test_figure_before_all_is_trained(study: Any) -> None:
    point = study.calibration()[0]
    with pytest.raises(SystemExit, match=r"not trained yet; run python scripts/study.py calibration first"):
        study.measure("calibration", [point])
