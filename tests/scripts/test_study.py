"""scripts/study.py makes runs that fit the configuration, and says what their figures say."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.resolvers import register_resolvers
from tests import ROOT
from tests.toy_reviews import write_archive

TRAINED = [
    "data_efficiency", "label_noise", "sensitivity", "architecture_gap", "levers", "best_recipe", "teacher_quality",
    "calibration",
]  # fmt: skip


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("study")
    for name, folder in (("RUNS", tmp_path / "runs"), ("RESULTS", tmp_path / "results")):
        monkeypatch.setattr(module, name, folder)
    archive = write_archive(tmp_path / "archive", movies=120, others=30)
    monkeypatch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: archive)
    monkeypatch.setenv("KD_LIGHTNING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "run_of", lambda settings: type("Run", (), {"data": reviews()}))
    return module


def reviews() -> Any:
    from kd_lightning.data import Reviews

    return Reviews(transfer=["amazon"], tokenizer="wordpiece:400")


MANY = {"sensitivity", "levers", "label_noise"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in MANY else ()) for name in TRAINED]
)
def test_every_point_composes(study: Any, name: str) -> None:
    from hydra import compose, initialize_config_dir

    from kd_lightning.pipeline.validation import validate

    register_resolvers()
    points = study.STUDIES[name].points()
    folders = [job.folder for point in points for job in study.jobs(name, point)]
    assert len(set(folders)) == len(folders) == 5 * len(points)
    jobs = [study.jobs(name, point)[0] for point in points]
    kinds = {re.sub(r"[\d.]+", "", " ".join(sorted(job.overrides))): job for job in jobs}  # others differ in a number
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for job in kinds.values():
            validate(compose("config", job.overrides))


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
    figures = [(x, {"mean": mean, "std": 0.01, "values": [mean] * 5}) for x, mean in points]
    return [{"x": x, "test": one, "validation": one, "teacher": one["mean"] + 0.1} for x, one in figures]


def test_findings_state_what_the_figures_show(study: Any) -> None:
    finding = {name: one.finding for name, one in study.STUDIES.items()}
    start = "labels, start from the teacher"
    taught = {
        "labels alone": curve((5, 0.6), (100, 0.8)), start: curve((5, 0.7), (100, 0.82)),
        "teacher, all sentences": curve((5, 0.81), (10, 0.79), (50, 0.81), (100, 0.85)),
    }  # fmt: skip
    assert finding["data_efficiency"](taught).startswith(
        "With a teacher, 50 % of the labels are enough to match a student trained on all of them, and 100 % of the "
    )
    assert "the teacher adds +3.0 ± 0.6 points to the latter" in finding["data_efficiency"](taught)
    taught["teacher, all sentences"] = curve((5, 0.7), (100, 0.75))
    assert "teacher, no share of the labels" in finding["data_efficiency"](taught)
    noise = {
        "labels alone": curve((0, 0.8), (40, 0.6)), "soft targets": curve((0, 0.79), (40, 0.7)),
        "soft targets, teachers of folds": curve((0, 0.78), (40, 0.65)),
        "label_trust, teachers of folds": curve((0, 0.77), (40, 0.69)),
    }  # fmt: skip
    table = finding["label_noise"](noise)
    assert table.startswith("With 40 % wrong labels, soft targets does best. ")
    assert table.endswith(
        "| wrong labels | 0 % | 40 % |\n| :-- | --: | --: |\n| soft targets | 79.0 | 70.0 |\n"
        "| label_trust, teachers of folds | 77.0 | 69.0 |\n| soft targets, teachers of folds | 78.0 | 65.0 |\n"
        "| labels alone | 80.0 | 60.0 |\n"
        "| label_trust minus soft targets of the same teachers | -1.0 ± 0.6 | +4.0 ± 0.6 |\n"
        "| label_trust minus soft targets of one teacher | -2.0 ± 0.6 | -1.0 ± 0.6 |"
    )
    swept = {
        "labels alone": curve((1, 0.6)), start: curve((1, 0.7), (2, 0.75)),
        "T 1, alpha 0.5": curve((1, 0.73), (2, 0.77)), "T 4, alpha 0.5": curve((1, 0.76), (2, 0.8)),
    }  # fmt: skip
    swept[start][0]["test"] = {"mean": 0.79, "std": 0.0}  # lucky on test, which chooses nothing
    assert finding["sensitivity"](swept).startswith(
        "The learning rate matters most. Of 4 settings, 2 are better than labels from the same start and 1 worse, by "
        "two standard errors."
    )
    assert finding["sensitivity"](swept).endswith(
        "| learning rate | 4.0 |\n| temperature | 3.0 |\n| alpha | 0.0 |\n| worst setting, % | 73.0 |\n"
        "| best setting, % | 80.0 |\n| labels from the same start, at their best rate (2), % | 75.0 |"
    )
    gaps = {"labels alone": curve(("a", 0.7), ("b", 0.7)), "M teaches": curve(("a", 0.75), ("b", 0.69))}
    gaps["N teaches"] = curve(("a", 0.7), ("b", 0.75))
    assert "| M | 85.0 | +5.0 ± 0.6 | -1.0 ± 0.6 |" in finding["architecture_gap"](gaps)
    assert finding["architecture_gap"](gaps).startswith("Best teacher: M for a, N for b. ")
    quality = {"distilled": curve((90.0, 0.805), (80.0, 0.7), (85.0, 0.8))}
    assert finding["teacher_quality"](quality).startswith(
        "A better teacher makes a better student up to a teacher of 85.0 %: beyond, the gain of +0.5 ± 0.6 points is"
    )
    assert finding["teacher_quality"](quality).endswith("| 80.0 | 70.0 |\n| 85.0 | 80.0 |\n| 90.0 | 80.5 |")
    levers = {
        start: curve(("as it stands", 0.6)),
        "distilled": curve(("as it stands", 0.7), ("worse", 0.65), ("good", 0.72), ("better", 0.75), ("same", 0.71)),
    }
    levers["distilled"][2]["validation"] = {"mean": 0.69}
    assert finding["levers"](levers).endswith(
        "Of 5 changes, 2 are better and 2 worse by more than two standard errors.\n\n| change | points | verdict |\n"
        "| :-- | --: | --: |\n| better | +5.0 ± 0.6 | better |\n"
        "| good | +2.0 ± 0.6 | better, but not on validation |\n| same | +1.0 ± 0.6 | within noise |\n"
        "| worse | -5.0 ± 0.6 | worse |\n| labels alone, from the same start | -10.0 ± 0.6 | worse |"
    )
    levers[start] = curve(("as it stands", 0.8))
    assert "| labels alone, from the same start | +10.0 ± 0.6 | better |" in finding["levers"](levers)
    del levers[start]
    assert "labels alone" not in finding["best_recipe"](levers)
    errors = {"teacher as it is": curve((1, 0.05), (4, 0.02)), "teacher calibrated": curve((1, 0.03), (4, 0.01))}
    assert finding["calibration"](errors).startswith(
        "A calibrated teacher lowers the student's calibration error at 2 of 2 temperatures"
    )
    assert finding["calibration"](errors).endswith(
        "| teacher | 0.150 | 0.130 |\n| student at T 1 | 0.050 | 0.030 |\n| student at T 4 | 0.020 | 0.010 |"
    )
    budgets = {
        "reviews_fast": curve((5, 0.7), (9, 0.8)), "reviews_slow": curve((5, 0.7), (20, 0.79)),
        "reviews_best": curve((5, 0), (30, 0.85)), "images": curve((2, 0.8), (3, 0.9)),
    }  # fmt: skip
    assert finding["stage_budget"](budgets).endswith(
        "| `reviews_fast` | 9 | 80.0 | yes |\n| `reviews_slow` | 20 | 79.0 |  |\n"
        "| `reviews_best` | 30 | 85.0 | yes |\n| `images` | 3 | 90.0 |  |"
    )


def test_a_panel_shows_its_own_temperature(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []

    def keep(figure: Figure, *_: Any, **__: Any) -> None:
        drawn.extend([axes.get_title(), *(text.get_text() for text in axes.texts)] for axes in figure.axes)

    monkeypatch.setattr(Figure, "savefig", keep)
    study.picture(
        "sensitivity", {name: curve((0.1, 0.6)) for name in ("labels alone", "T 1, alpha 1", "T 16, alpha 1")}
    )
    assert drawn == [["T 1", "alpha 1"], ["T 16", "labels alone", "alpha 1"]], "what all panels have is named once"


@pytest.mark.parametrize(
    ("name", "curves"),
    [
        ("data_efficiency", {"labels alone": curve((5, 0.6), (100, 0.8))}),
        ("architecture_gap", {"labels alone": curve(("BiLSTM", 0.6), ("TextCNN", 0.8)), "M": curve(("TextCNN", 0.8))}),
        ("sensitivity", {"labels alone": curve((0.1, 0.6)), "T 1, alpha 0.5": curve((0.1, 0.7))}),
        ("calibration", {"teacher as it is": curve((1, 0.1), (4, 0.2))}),
        ("levers", {"labels": curve(("a", 0.6)), "distilled": curve(*((one, 0.8) for one in "abcdefgh"))}),
        ("stage_budget", {"reviews_bilstm": curve((50, 0.6), (100, 0.8))}),
    ],
)
def test_pictures_are_drawn(study: Any, name: str, curves: Any) -> None:
    study.RESULTS.mkdir()
    study.picture(name, curves)
    assert (study.RESULTS / f"{name}.png").stat().st_size > 10_000


def test_training_time_is_that_of_the_steps_of_the_recipe(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second, 10 ms a step and 200 ms a validation; what the first training of a process pays is not counted."""
    trained: list[dict[str, str]] = []

    def train(settings: list[str]) -> None:
        given = dict(one.split("=", 1) for one in settings)
        trained.append(given)
        folder = Path(given["run_dir"]) / "seed_0/distill"
        folder.mkdir(parents=True)
        seconds = 0.5 + 0.01 * int(given["trainer.max_steps"]) + 0.2 * int(given["validations"])
        (folder / "stage.json").write_text(json.dumps({"seconds": seconds + 5 * (len(trained) == 1)}))

    cfg = SimpleNamespace(trainer={"max_steps": 4000}, validations=20)
    monkeypatch.setattr(study, "run_of", lambda settings: SimpleNamespace(cfg=cfg))
    monkeypatch.setattr(study, "train_run", train)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    assert study.training_seconds("reviews_bilstm", "distill") == pytest.approx(44.5)
    assert all(one["teacher.cache"] == "require" for one in trained)


def test_no_test_figure_before_all_is_trained(study: Any) -> None:
    point = study.calibration()[0]
    with pytest.raises(SystemExit, match=r"not trained yet; run python scripts/study.py calibration first"):
        study.measure("calibration", [point])
