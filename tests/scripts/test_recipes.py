"""scripts/recipes.py holds recipes against their goals, and reads no test split before it is told to."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kd_lightning.config.instantiate import conf_dir
from kd_lightning.pipeline.run import train_all
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.evaluation import evaluate, of_network
from tests import ROOT
from tests.conftest import tiny_overrides, write_toy_csv


@pytest.fixture(scope="module")
def recipes() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        return importlib.import_module("recipes")


def spread(*values: float) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "std": 0.0, "values": list(values)}


def started(value: float) -> dict[str, Any]:
    return {"baseline_initialised": spread(value)}


def test_every_recipe_is_an_experiment(recipes: Any) -> None:
    assert {f"{name}.yaml" for name in recipes.RECIPES} <= {path.name for path in (conf_dir() / "experiment").iterdir()}


@pytest.mark.parametrize(
    "name", ["reviews_bilstm", "reviews_tiny", "reviews_3layer", "reviews_bow", "fashion_resnet", "multi_task"]
)
def test_every_run_of_a_recipe_composes_and_has_a_folder_of_its_own(recipes: Any, name: str) -> None:
    from hydra import compose, initialize_config_dir

    from kd_lightning.pipeline.resolvers import register_resolvers
    from kd_lightning.pipeline.validation import validate

    register_resolvers()
    found = [job for some in recipes.all_jobs(name).values() for job in some]
    assert len({job.folder for job in found}) == len(found) == 5 * (1 + len(recipes.RECIPES[name].variants))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for job in found[::5]:
            cfg = compose("config", job.overrides)
            validate(cfg)
            assert cfg.name == name


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("reviews_3layer", "teacher.checkpoint={}/teacher_of_reviews_bilstm"),
        ("multi_task", "+tasks.sentiment.teacher.checkpoint={}/teacher_of_reviews_bilstm"),
        ("fashion_resnet", "teacher.checkpoint={}/fashion_resnet/0"),
    ],
)
def test_one_teacher_teaches_a_recipe_and_its_variants(recipes: Any, name: str, setting: str) -> None:
    for variant, some in recipes.all_jobs(name).items():
        trains_it = variant is None and name == "fashion_resnet"
        given = [one for one in some[0].settings if "teacher.checkpoint=" in one]
        assert given == ([] if trains_it else [setting.format(recipes.RUNS)])


@pytest.mark.parametrize(
    ("name", "row", "met"),
    [
        ("reviews_bilstm", {"ratio": spread(0.9), "distilled": spread(0.85), **started(0.84)}, True),
        ("reviews_bilstm", {"ratio": spread(0.89), "distilled": spread(0.85), **started(0.8)}, False),
        ("reviews_bilstm", {"ratio": spread(0.95), "distilled": spread(0.85), **started(0.845)}, False),
        ("reviews_tiny", {"ratio": spread(0.84, 0.86)}, True),
        ("reviews_bow", {"ratio": spread(0.59)}, False),
        ("reviews_3layer", {"distilled": spread(0.842), "teacher": spread(0.85), "latency_share": 0.55}, True),
        ("reviews_3layer", {"distilled": spread(0.84), "teacher": spread(0.85), "latency_share": 0.5}, False),
        ("reviews_3layer", {"distilled": spread(0.85), "teacher": spread(0.85), "latency_share": 0.56}, False),
        ("multi_task", {"distilled": spread(0.75), "teacher": spread(0.755), "size_share": 0.3}, True),
        ("multi_task", {"distilled": spread(0.74), "teacher": spread(0.755), "size_share": 0.3}, False),
    ],
)  # fmt: skip
def test_goals(recipes: Any, name: str, row: dict[str, Any], met: bool) -> None:
    assert recipes.RECIPES[name].met(row) is met


@pytest.mark.parametrize(
    ("distilled", "hint", "met"),
    [((0.9, 0.91, 0.905), 0.92, True), ((0.9, 0.91, 0.905), 0.9, False), ((0.88, 0.95, 0.879), 0.99, False)],
)
def test_the_goal_of_pictures_counts_standard_errors_of_the_gain(
    recipes: Any, distilled: tuple[float, ...], hint: float, met: bool
) -> None:
    row = {
        "parameters": 60_000, "distilled": spread(*distilled), "baseline": spread(0.88, 0.88, 0.88),
        "best_features": "hint", "variants": {"hint": {"test": spread(hint)}},
    }  # fmt: skip
    assert recipes.RECIPES["fashion_resnet"].met(row) is met


def test_no_test_figure_of_a_recipe_that_is_not_trained(
    recipes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recipes, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--final", "reviews_bow"])
    with pytest.raises(SystemExit, match=r"not trained yet: reviews_bow, seed 0, .*; without --final this trains them"):
        recipes.main()


def test_no_test_figure_without_the_strategies_that_a_goal_compares(
    recipes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recipes, "RUNS", tmp_path)
    for job in recipes.jobs("fashion_resnet"):
        job.stage("distill").mkdir(parents=True)
        (job.stage("distill") / "stage.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--final", "fashion_resnet"])
    with pytest.raises(SystemExit, match=r"not trained yet: fashion_resnet, hint, seed 0, "):
        recipes.main()


def test_a_mistake_in_a_configuration_is_one_line(recipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(name: str, folder: Path) -> None:
        raise ConfigError(f"{name}: trainer.max_steps=-3")

    monkeypatch.setattr(recipes, "train_teacher", refuses)
    monkeypatch.setattr(sys, "argv", ["recipes.py", "reviews_bow"])
    with pytest.raises(SystemExit, match=r"^recipes: reviews_bilstm: trainer\.max_steps=-3$"):
        recipes.without_traceback(recipes.main)


def test_the_test_split_is_read_whatever_else_is_in_the_folder_of_the_experiment(
    recipes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user's own `kd-train experiment=...` with other settings is no reason to refuse."""
    trainings = sys.modules["trainings"]
    monkeypatch.chdir(tmp_path)
    file = write_toy_csv(tmp_path / "toy.csv", rows=60)
    settings = ("experiment=quickstart", "data=text_files", f"data.train_file={file}", "data.tokenizer=wordpiece:200")
    more = ("data.teacher_tokenizer=null", "~data.transfer", f"data.cache_dir={tmp_path}")
    own = tmp_path / "runs/quickstart/config.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: quickstart\nalpha: 0.123\n")
    assert len(list(trainings._data((*settings, *more)).test_dataloader())) > 0
    assert own.read_text() == "name: quickstart\nalpha: 0.123\n"


def test_a_teacher_is_scored_in_float32_whatever_its_students_were_told(
    recipes: Any, toy_csv: Path, own_home: Path, tmp_path: Path
) -> None:
    trainings = sys.modules["trainings"]
    more = ("stages=[teacher,distill]", "teacher.precision=bf16")
    job = trainings.Job("toy", (*tiny_overrides(toy_csv, tmp_path / "run"), *more), tmp_path / "run", 0)
    run = trainings.run_of(job.overrides)
    train_all(run)
    batches = run.data.select(tokens="teacher").test_dataloader()
    models = of_network(run.teacher.network), run.predicting_teacher
    exact, rounded = (evaluate(run.task, model, batches).scores["cross_entropy"] for model in models)
    assert trainings.teacher_scores(job)["cross_entropy"] == pytest.approx(exact, abs=1e-6)
    assert rounded != pytest.approx(exact, abs=1e-6), "what they were told is rounded"


def test_a_recipe_that_trains_its_teachers_gives_them_to_another_run(
    recipes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recipes, "RUNS", tmp_path)
    for task in ("sentiment", "rating", "domain"):
        (tmp_path / "multi_task/0/tasks" / task / ("" if task == "sentiment" else "teacher")).mkdir(parents=True)
    folder = tmp_path / "multi_task/0/tasks"
    assert recipes.trained_teachers("multi_task") == [
        f"+tasks.domain.teacher.checkpoint={folder}/domain", f"+tasks.rating.teacher.checkpoint={folder}/rating",
    ]  # fmt: skip
    assert recipes.trained_teachers("fashion_resnet") == [f"teacher.checkpoint={tmp_path}/fashion_resnet/0"]
    assert recipes.trained_teachers("reviews_bow") == []


def test_trainings_that_fail_are_told_and_the_others_are_done(
    recipes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = sys.modules["trainings"]

    def one(job: Any) -> None:
        if job.seed == 0:
            raise ConfigError("lr=-1")
        folder = job.stage("distill")
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text("{}")

    monkeypatch.setattr(trainings, "train", one)
    monkeypatch.setattr(trainings, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(1))
    monkeypatch.setattr(trainings.Job, "validation", lambda self, stage: 0.8)
    some = [trainings.Job(f"seed {seed}", (), tmp_path / str(seed), seed) for seed in range(2)]
    with pytest.raises(SystemExit, match=r"^1 of 2 trainings failed:\nseed 0: lr=-1$"):
        trainings.train_all(some)
    assert "2/2  seed 1: validation distill 0.8000" in capsys.readouterr().out


def test_an_unknown_recipe_is_one_line(recipes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes.py", "reviews"])
    with pytest.raises(SystemExit, match="there is no reviews; there are reviews_bilstm"):
        recipes.main()
