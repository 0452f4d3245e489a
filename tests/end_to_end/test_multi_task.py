"""Several tasks, several teachers, one student: offline and small."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import load_file

from kd_lightning.cli.evaluate import score_split
from kd_lightning.cli.predict import main as predict
from kd_lightning.data.sources.files import FileReader
from kd_lightning.evaluation.evaluator import score_file
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.objectives import run_objective
from kd_lightning.pipeline.prepare import prepare
from kd_lightning.pipeline.run import score, train_all
from kd_lightning.pipeline.stages import plan
from kd_lightning.pipeline.validation import validate
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.training.run_folder import load_run
from tests.conftest import write_toy_csv
from tests.forks import command
from tests.runs import student_of
from tests.toy_reviews import write_archive, write_tokenizer

Composed = Callable[..., DictConfig]
TASKS = ("sentiment", "domain", "rating")
NETWORKS = [
    "model@teacher.network=lstm_teacher", "teacher.network.embedding_size=16",
    "teacher.network.hidden_size=16", "model@student=lstm_student", "student.embedding_size=8", "student.hidden_size=8",
    *(f"~tasks.{task}.teacher.network" for task in ("domain", "rating")), "~student.layers", "student.dropout=0.1",
    "trainer.precision=32-true", "teacher.trainer.precision=32-true", "teacher.precision=float32",
    "teacher.optimizer.lr=0.02", "optimizer.lr=0.02", "validations=2", "teacher.validations=2",
    "teacher.trainer.max_epochs=100",
]  # fmt: skip

SHORT = [f"tasks.{task}.teacher.trainer.max_steps=8" for task in TASKS]
"""For teachers whose scores nobody looks at."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences and the tokenizer of all tests, so that one's finished run is another's. Read only."""
    folder = tmp_path_factory.mktemp("toy")
    write_archive(folder / "archive")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def archive(toy: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: toy / "archive")


def small(toy: Path, folder: Path) -> list[str]:
    """conf/experiment/multi_task.yaml with small networks, a small budget and a tokenizer of the toy words."""
    tokenizer = toy / "tokenizer"
    return [
        "experiment=multi_task", *NETWORKS, "trainer.max_steps=60", "data.batch_size=32", f"run_dir={folder}",
        *(f"+tasks.{task}.teacher.trainer.max_steps=40" for task in TASKS[:1]),
        *(f"tasks.{task}.teacher.trainer.max_steps=60" for task in TASKS[1:]),
        *(f"data.tasks.{task}.{key}={tokenizer}" for task in TASKS for key in ("tokenizer", "teacher_tokenizer")),
    ]  # fmt: skip


@pytest.fixture
def overrides(toy: Path, tmp_path: Path, archive: None) -> list[str]:
    return small(toy, tmp_path / "run")


@pytest.fixture(scope="module")
def trained(toy: Path, composed: Composed) -> Path:
    """A finished run of short trainings. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LIGHTNING_HOME", str(toy / "home"))
        patch.setattr("kd_lightning.data.sources.reviews.fetch", lambda name: toy / "archive")
        run(composed(*small(toy, toy / "run"), *SHORT, "trainer.max_steps=12"))
    return toy / "run"


def run(cfg: DictConfig) -> tuple[Any, str]:
    output = StringIO()
    pipeline = Run(cfg, Console(file=output, width=120))
    train_all(pipeline)
    return pipeline, output.getvalue()


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stage.json").read_text())
    return found


def test_the_experiment_runs_and_reports_each_task_and_their_average(
    composed: Composed, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = "stages=[teacher,baseline,distill,finetune]"
    pipeline, _ = run(composed(*overrides, stages))
    report = compare(pipeline, "kd-train ...")
    folder = tmp_path / "run"
    steps = [record(folder / "tasks" / task / "teacher")["steps"] for task in TASKS]
    assert steps == [40, 60, 60], "each teacher has its own budget"
    assert record(folder / "seed_0/baseline")["steps"] == record(folder / "seed_0/distill")["steps"] == 60

    models = report["models"]
    assert list(models) == ["teacher", "baseline", "distilled", "finetuned"]
    for model in models.values():
        test = {name: described["mean"] for name, described in model["test"].items()}
        mains = [test["sentiment/accuracy"], test["domain/accuracy"], test["rating/pearson"]]
        assert test["average"] == pytest.approx(sum(mains) / 3)
        assert test["rating/rmse"] > 0
    assert models["teacher"]["test"]["average"]["mean"] > 0.9, "the toy tasks are easy"
    assert models["distilled"]["test"]["average"]["mean"] > 0.6
    assert models["distilled"]["test"]["rating/rmse_to_teacher"]["mean"] > 0
    teachers = [load_run(folder / "tasks" / task / "teacher").network for task in TASKS]
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in teachers]
    assert models["teacher"]["size"]["parameters"] == sum(sizes)
    assert models["teacher"]["title"] == "3 teachers"
    assert models["teacher"]["latency_ms"]["p50"] > models["distilled"]["latency_ms"]["p50"]
    assert report["data"]["monitor"] == "average"
    parts = {part["name"]: part for part in report["details"]["parts"]}
    assert set(parts) == set(TASKS)
    assert all(one["text"] for part in parts.values() for one in part["apart"])
    for part in parts.values():
        if counts := part["models"]["distilled"]:
            seed = models["distilled"]["test"][f"{part['name']}/accuracy"]["values"][0]
            assert sum(counts["right"]) / sum(counts["labels"]) == pytest.approx(seed)
    assert report["data"]["chance_score"] is report["differences"]["distilled"]["baseline"]["standard_error"] is None
    assert models["distilled"]["curves"][0]["validation_score"]["steps"] == [29, 59]
    assert set(models["distilled"]["curves"][0]["gradient_share"]) == {
        "sentiment/ce", "sentiment/kd", "domain/ce", "domain/kd", "rating/mse", "rating/kd"
    }  # fmt: skip
    text = (folder / "report.md").read_text()
    for row in ("average over tasks", "sentiment: accuracy", "domain: accuracy", "rating: Pearson correlation"):
        assert f"\n| {row} | " in text
    assert text.startswith("# MultiTaskData: sentiment, domain, rating: ")
    assert "constant prediction" not in text

    found = score_split(load_run(folder / "seed_0/distill"), folder, "test")
    assert found.scores["average"] == pytest.approx(models["distilled"]["test"]["average"]["mean"])
    assert found.examples == 144
    rating = score_split(load_run(folder / "tasks/rating/teacher"), folder / "tasks/rating/teacher", "test")
    assert rating.scores["pearson"] == pytest.approx(models["teacher"]["test"]["rating/pearson"]["mean"], abs=1e-6)
    with pytest.raises(KDError, match="predicts more than a class"):
        score_file(load_run(folder), "x.csv", FileReader())

    predict([str(folder), "a superb film actor tonight", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"text", *TASKS}
    assert set(said["domain"]["probabilities"]) == {"movie", "amazon", "nyt", "tweets"}
    assert set(said["rating"]) == {"score"}
    predict([str(folder), "a superb film actor tonight"])
    assert "sentiment" in capsys.readouterr().out
    predict([str(folder / "tasks/rating/teacher"), "a superb film actor tonight", "--json"])
    assert json.loads(capsys.readouterr().out)["score"] > 0


def test_a_second_run_reuses_everything_and_other_settings_are_refused(
    composed: Composed, overrides: list[str], trained: Path, tmp_path: Path
) -> None:
    overrides = [*overrides, *SHORT, "trainer.max_steps=12"]
    shutil.copytree(trained, tmp_path / "run")
    pipeline, said = run(composed(*overrides))
    assert said.count("finished before") == 5  # three teachers, baseline, student
    assert score(pipeline) == pytest.approx(record(tmp_path / "run/seed_0/distill")["validation"]["average"])
    with pytest.raises(ConfigError, match=r"tasks\.domain\.weight was 1.0, now 2"):
        Run(composed(*overrides, "+tasks.domain.weight=2"))

    finished = [f"+tasks.{task}.teacher.checkpoint={tmp_path}/run/tasks/{task}" for task in TASKS]
    other = [*overrides, f"run_dir={tmp_path / 'other'}", "stages=[distill]"]
    with pytest.raises(ConfigError, match="a task lacks its teacher: add teacher to stages"):
        run(composed(*other, *finished[:2]))
    again, _ = run(composed(*other, *finished))
    assert not (tmp_path / "other/tasks/domain/teacher/stage.json").exists()
    assert again.teacher.fingerprint == pipeline.teacher.fingerprint
    one, two = (load_file(tmp_path / name / "seed_0/distill/model.safetensors") for name in ("run", "other"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_what_learns_from_labels_serves_every_point_of_a_sweep(composed: Composed, overrides: list[str]) -> None:
    """A baseline's settings, which say where it is kept, know neither alpha nor the losses of the tasks."""
    settings, losses = [], []
    for more in ("alpha=0.9", "alpha=0.25", "+tasks.domain.weight=2"):
        pipeline = Run(composed(*overrides, more))
        [stage] = [stage for stage in plan(pipeline) if stage.kind == "baseline"]
        settings.append(prepare(pipeline, stage).settings)
        losses.append(pipeline.parts["rating"].cfg.distillation)
    one, other_alpha, other_weight = settings
    assert one == other_alpha != other_weight
    assert losses[0] != losses[1]


class StopAt(L.Callback):
    """Breaks the training of several tasks off at an optimizer step."""

    step = -1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == StopAt.step and "seed_0/distill" in str(trainer.default_root_dir):
            raise RuntimeError("stopped")


def test_a_stopped_student_goes_on_bit_by_bit(
    composed: Composed, overrides: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [
        *overrides, "stages=[distill]", "trainer.max_steps=48", "checkpoint_every_n_steps=7",
        "+callbacks.stop={_target_: tests.end_to_end.test_multi_task.StopAt}",
        *(f"+tasks.{task}.teacher.checkpoint={trained}/tasks/{task}" for task in TASKS),
    ]  # fmt: skip
    common += ["data.tasks.sentiment.views=1", "teacher.cache_views=2"]
    run(composed(*common, f"run_dir={tmp_path / 'whole'}"))
    monkeypatch.setattr(StopAt, "step", 38)  # in the second epoch
    with pytest.raises(RuntimeError, match="stopped"):
        run(composed(*common, f"run_dir={tmp_path / 'stopped'}"))
    monkeypatch.setattr(StopAt, "step", -1)
    run(composed(*common, f"run_dir={tmp_path / 'stopped'}"))
    whole, resumed = (load_file(tmp_path / name / "seed_0/distill/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_tasks_weight_reaches_both_trainings(composed: Composed, overrides: list[str]) -> None:
    weights_of_tasks = ["+tasks.domain.weight=0", "+tasks.sentiment.weight=3"]
    pipeline = Run(composed(*overrides, *SHORT, *weights_of_tasks, "alpha=0.9"))
    student = student_of(pipeline)
    weights = run_objective(pipeline, student, None).weights
    assert weights == pytest.approx(
        {"sentiment/ce": 0.3, "sentiment/kd": 2.7, "domain/ce": 0, "domain/kd": 0, "rating/mse": 0.1, "rating/kd": 0.9}
    )
    assert pipeline.task.weights == {"sentiment": 3, "domain": 0, "rating": 1}
    assert pipeline.task.loss().weights == pipeline.task.weights
    schedule = "alpha={_target_: kd_lightning.schedules.Linear, start: 0.0, end: 1.0}"
    scheduled = run_objective(Run(composed(*overrides, schedule, "+tasks.domain.weight=2")), student, None)
    assert scheduled._weights(0.25) == pytest.approx({
        "sentiment/ce": 0.75, "sentiment/kd": 0.25, "domain/ce": 1.5, "domain/kd": 0.5, "rating/mse": 0.75,
        "rating/kd": 0.25,
    })  # fmt: skip


def test_teachers_with_tokenizers_and_networks_of_their_own(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    other = write_tokenizer(tmp_path / "other_tokenizer", "wordpiece:50")
    chosen = [
        f"data.tasks.domain.teacher_tokenizer={other}", "teacher.cache=off", "stages=[teacher,distill]",
        "trainer.max_steps=6",
        "+tasks.domain.teacher.network={_target_: kd_lightning.models.bilstm.BiLSTM, hidden_size: 12}",
    ]  # fmt: skip
    pipeline, _ = run(composed(*overrides, *chosen))
    report = compare(pipeline, "kd-train ...")
    assert pipeline.providers[0].reads_other_tokens
    assert report["models"]["teacher"]["latency_ms"] is None, "no batch holds what all teachers read"
    assert report["models"]["teacher"]["test"]["domain/accuracy"]["mean"] > 0.9
    assert load_run(tmp_path / "run/tasks/domain/teacher").network.arguments["hidden_size"] == 12
    batch = next(iter(pipeline.student_data(0, True).train_dataloader()))
    assert len(batch["task"].unique()) == 3, "lengths counted twice for one task would keep it apart"
    domain = batch["task"] == 1
    assert torch.equal(batch["teacher_input_ids"][~domain].sum(), batch["input_ids"][~domain].sum())
    assert not torch.equal(batch["teacher_input_ids"][domain].sum(), batch["input_ids"][domain].sum())


def test_the_command_takes_tasks_of_the_users_own_files(tmp_path: Path, own_home: Path) -> None:
    tokenizer, one = write_tokenizer(tmp_path / "tokenizer"), write_toy_csv(tmp_path / "one.csv", 120)
    two = write_toy_csv(tmp_path / "two.csv", 90, seed=1)
    chosen = [
        "data=multi_task", "+data@data.tasks.one=text_files", f"data.tasks.one.train_file={one}",
        "+data@data.tasks.two=text_files", f"data.tasks.two.train_file={two}",
        *(f"data.tasks.{task}.{role}tokenizer={tokenizer}" for task in ("one", "two") for role in ("", "teacher_")),
        *(o for o in NETWORKS if not o.startswith("~")), "trainer.max_steps=6", "teacher.trainer.max_steps=6",
        "name=own",
    ]  # fmt: skip
    result = command("kd-train", *chosen, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "two: teacher" in result.stdout
    assert (tmp_path / "runs/own/tasks/two/teacher/stage.json").is_file()
    assert json.loads((tmp_path / "runs/own/report.json").read_text())["data"]["class_names"][3] == "two: food"
    result = command("kd-train", *chosen, "+tasks.twoo.weight=2", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip() == "kd-train: tasks.twoo: there is no such task in data.tasks; did you mean 'two'?"


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (["+tasks.ratings.weight=2"], "tasks.ratings: there is no such task in data.tasks; did you mean 'rating'?"),
        (["+tasks.rating.wieght=2"], "tasks.rating.wieght: there is no such key; did you mean 'weight'?"),
        (["+tasks.sentiment.weight=-1"], "tasks.sentiment.weight=-1 must be at least 0"),
        (["+tasks.sentiment=3"], "tasks.sentiment=3 is no group of keys"),
        (["+tasks.domain.teacher.bach_size=3"], "tasks.domain.teacher.bach_size: there is no such key"),
        (["+tasks.domain.teacher.network.frozen=1"], "tasks.domain: teacher.network.frozen: kd_lightning.models.hf.pr"),
        (["+tasks.domain.teacher.trainer.max_step=1"], "tasks.domain: teacher.trainer.max_step: lightning.Trainer"),
        (["+tasks.domain.teacher.ema=0.9"], "tasks.domain: teacher.ema=0.9 makes the teacher from the student's own"),
        (["+tasks.domain.teacher.weights=learned"], "tasks.domain: teacher.weights are those of an ensemble's members"),
        (["teacher.checkpoint=x"], "leave out teacher.checkpoint (finished teachers are given as"),
        (["peers=['${student}']"], "each task has a teacher of its own, which outputs logits; leave out peers"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_the_key(composed: Composed, chosen: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        validate(composed("experiment=multi_task", *chosen))


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (["data.tasks.domain.tokenizer=wordpiece:90"], "domain has another tokenizer and vocab_size than sentiment"),
        (["data.tasks.rating.max_length=32"], "rating has another max_length than sentiment, and"),
        (["data.tasks.rating.view_sets=null", "data.tasks.rating.views=1"], "data.tasks.rating.view_sets=null"),
        (["data.sampling_temperature=0"], "data.sampling_temperature=0: expected a positive number"),
        (["data.tasks.rating.labels=ratings"], "labels='ratings' is not one of sentiment, domain, rating"),
        (["~tasks.rating.distillation"], "task rating: labels are scores, and this loss needs classes"),
        (["distillation=pkt"], "distillation.terms.sentiment/pkt: reads pooled: with several tasks, only logits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_training(
    composed: Composed, overrides: list[str], tmp_path: Path, chosen: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as raised:
        run(composed(*overrides, *chosen))
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "run").glob("**/stage.json"))


def test_a_student_is_made_from_the_first_tasks_teacher(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    overrides = [o for o in overrides if not o.startswith(("~student", "student.", "model@", "teacher.network."))]
    small = [f"teacher.network.{size}" for size in ("hidden_size=8", "num_heads=2", "intermediate_size=8")]
    chosen = ["model@teacher.network=transformer", "teacher.network.num_layers=2", *small, "student.layers=1"]
    pipeline, _ = run(composed(*overrides, *chosen, *SHORT, "trainer.max_steps=4"))
    started = student_of(pipeline)
    first, second = (pipeline.provider_of(pipeline.parts[task]).loaded.network for task in TASKS[:2])
    table = started.get_input_embeddings().weight
    assert torch.equal(table, first.get_input_embeddings().weight)
    assert not torch.equal(table, second.get_input_embeddings().weight)
    folders = {path.name for path in (tmp_path / "run/seed_0").iterdir()}
    assert folders == {"baseline", "baseline_initialised", "distill"}
    with pytest.raises(ConfigError, match="a task lacks its teacher"):
        run(composed(*overrides, *chosen, "stages=[baseline]", f"run_dir={tmp_path / 'none'}"))


# -- one regression, in the ordinary pipeline -------------------------------------------------------------------------


@pytest.fixture
def regression(tmp_path: Path, archive: None) -> list[str]:
    return [
        *(o for o in NETWORKS if not o.startswith("~")), "data=reviews", "data.labels=rating",
        "data.tokenizer=wordpiece:300", "data.batch_size=16", "distillation=regression", "trainer.max_epochs=4",
        "teacher.trainer.max_epochs=10",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def test_a_regression_is_trained_selected_and_reported_by_correlation(
    composed: Composed, regression: list[str], tmp_path: Path
) -> None:
    pipeline, said = run(composed(*regression, "data.views=1", "seeds=2"))
    assert list(pipeline.parts) == [""]
    report = compare(pipeline, "kd-train ...")
    models = report["models"]
    assert models["teacher"]["test"]["pearson"]["mean"] > 0.8
    assert models["distilled"]["test"]["pearson"]["mean"] > 0.7
    assert set(models["distilled"]["test"]) == {"pearson", "rmse", "rmse_to_teacher"}
    assert "val/pearson" in said
    assert report["data"]["monitor"] == "pearson"
    [part] = report["details"]["parts"]
    assert [set(one) for one in part["apart"]] == [{"index", "distance", "label", "student", "teacher", "text"}] * 12
    assert part["models"]["distilled"] == {}, "of scores nothing is counted"
    assert (tmp_path / "run/curves.png").is_file()
    assert "| Pearson correlation | " in (tmp_path / "run/report.md").read_text()
    best = max((0, 1), key=lambda seed: record(tmp_path / f"run/seed_{seed}/distill")["validation"]["pearson"])
    assert load_run(tmp_path / "run").folder.parent.name == f"seed_{best}"


def test_a_loss_on_classes_is_refused_for_a_regression(
    composed: Composed, regression: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="distillation: labels are scores, and this loss needs classes"):
        run(composed(*regression, "distillation=soft_target"))
    assert not (tmp_path / "run").exists()


def test_the_likeliest_of_no_classes_are_not_stored(composed: Composed, regression: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.cache_top_k=1 stores the likeliest classes, and these data have"):
        run(composed(*regression, "teacher.cache_top_k=1"))
    assert not (tmp_path / "run").exists()
