"""The whole run, offline and small: every stage, what it leaves, and what a second run does with it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from kd_lightning.cli.evaluate import main as kd_eval
from kd_lightning.cli.predict import main as predict
from kd_lightning.evaluation.evaluator import predict as predict_records
from kd_lightning.evaluation.evaluator import text_batches
from kd_lightning.evaluation.report import load_report
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import train_all
from kd_lightning.pipeline.shared import link_shared
from kd_lightning.pipeline.stages import plan
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import network_digest, read_json
from kd_lightning.runtime.seals import write_sealed
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.run_folder import (
    finish_stage,
    load_run,
    model_of,
    read_stage,
    teacher_precision,
    write_config,
)
from tests.conftest import tiny_overrides, write_toy_csv
from tests.runs import student_of

Composed = Callable[..., DictConfig]

STARTED = [
    "model@student=embeddings_from_teacher", "student.network.embedding_size=8", "student.network.hidden_size=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all tests, so that a finished run of it is one of theirs. Read only."""
    return write_toy_csv(tmp_path_factory.mktemp("toy") / "toy.csv")


@pytest.fixture
def overrides(toy: Path, tmp_path: Path, own_home: Path) -> list[str]:
    return tiny_overrides(toy, tmp_path / "run")


@pytest.fixture(scope="module")
def trained(toy: Path, composed: Composed) -> Path:
    """A finished run with all stages of the default and its report. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_LIGHTNING_HOME", str(toy.parent / "home"))
        run(composed(*tiny_overrides(toy, toy.parent / "run")))
    return toy.parent / "run"


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """That run, in the folder of `overrides`."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def run(cfg: DictConfig) -> tuple[Run, dict, str]:
    output = StringIO()
    pipeline = Run(cfg, Console(file=output, width=120))
    train_all(pipeline)
    report = compare(pipeline, "kd-train ...")
    return pipeline, report, output.getvalue()


def test_every_stage_leaves_a_network_and_the_report_compares_them(
    composed: Composed, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = "stages=[teacher,baseline,distill,finetune]"
    views = ["data.views=2", "data.drop_probability=0"]  # a single word decides the class of a toy sentence
    _, report, output = run(composed(*overrides, stages, *views, "seeds=2"))
    models = report["models"]
    assert set(models) == {"teacher", "baseline", "distilled", "finetuned"}
    assert models["teacher"]["test"]["accuracy"]["mean"] > 0.8  # the toy task is easy
    assert models["distilled"]["test"]["accuracy"]["mean"] > 0.5
    assert len(models["baseline"]["test"]["accuracy"]["values"]) == 2
    assert report["seeds"] == [0, 1]
    [part] = report["details"]["parts"]
    assert set(part["models"]) == set(models)
    for name, counts in part["models"].items():  # those of the first seed
        assert sum(counts["labels"]) == report["data"]["n_test"]
        accuracy = sum(counts["right"]) / report["data"]["n_test"]
        assert accuracy == pytest.approx(models[name]["test"]["accuracy"]["values"][0])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert part["apart"][0]["text"] in page
    assert load_report(tmp_path / "run") == report
    steps = [
        json.loads((tmp_path / "run" / "seed_0" / stage / "stage.json").read_text())["steps"]
        for stage in ("baseline", "distill")
    ]
    assert steps[0] == steps[1], "the baseline gets as many optimizer steps as the distillation"
    assert "distilled student" in output
    assert "distill, seed 1  step" in output

    model = load_run(tmp_path / "run" / "teacher")
    assert model.class_names == ["food", "science", "运动"]
    predict([str(tmp_path / "run" / "teacher"), "球赛 goal team match, today", "--json"])
    assert json.loads(capsys.readouterr().out)["label"] == "运动"


def test_every_command_scores_a_teacher_in_the_precision_of_its_run(
    composed: Composed, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["teacher.precision=bf16", "stages=[teacher,baseline]", "teacher.trainer.max_epochs=1"]
    pipeline, report, _ = run(composed(*overrides, *stages))
    kd_eval([str(tmp_path / "run/teacher"), "--json"])
    evaluated = json.loads(capsys.readouterr().out)
    scores = {name: described["mean"] for name, described in report["models"]["teacher"]["test"].items()}
    assert scores["cross_entropy"] == evaluated["cross_entropy"], "to the bit"
    assert scores["accuracy"] == evaluated["accuracy"]
    batch = next(iter(pipeline.data.val_dataloader()))
    trained = load_run(tmp_path / "run/teacher")
    expected = {precision: FrozenTeacher(trained.network, precision)(batch).logits for precision in ("bf16", "float32")}
    assert not torch.equal(expected["bf16"], expected["float32"])
    assert torch.equal(model_of(trained)(batch).logits, expected["bf16"])
    sentences = [("球赛 goal team match, today",)]
    (one,) = text_batches(trained, sentences)
    logits = FrozenTeacher(trained.network, "bf16")(one).logits
    assert predict_records(trained, sentences) == trained.task.read(logits, one, trained.class_names)
    write_config(tmp_path / "other", "teacher: {precision: float32}\n")
    assert teacher_precision(trained.folder) == "bf16"
    assert teacher_precision(trained.folder, tmp_path / "other") == "float32", "a teacher of another run's students"


def test_a_second_run_reuses_everything_and_reads_the_test_split_no_more(
    composed: Composed, overrides: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_report(finished)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the test split was read again")

    monkeypatch.setattr("kd_lightning.pipeline.compare._make", refuse)
    _, second, output = run(composed(*overrides))
    assert second == first
    assert output.count("finished before") == 3


def test_a_hugging_face_data_set_on_disk_and_a_transformer(
    composed: Composed, overrides: list[str], toy: Path, tmp_path: Path
) -> None:
    rows = list(csv.DictReader(toy.open(encoding="utf-8")))
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    Dataset.from_dict(columns).save_to_disk(str(tmp_path / "disk"))
    chosen = [o for o in overrides if not o.startswith(("data=", "data.train_file", "student", "model@student"))]
    sizes = ["student.hidden_size=8", "student.num_layers=1", "student.intermediate_size=8"]
    data = ["data=hf_dataset", f"data.name={tmp_path / 'disk'}"]
    brief = ["teacher.trainer.max_steps=2", "trainer.max_steps=2"]
    _, report, _ = run(composed(*data, "model@student=transformer", *sizes, *chosen, *brief))
    assert report["data"]["class_names"] == ["food", "science", "运动"]
    assert load_run(tmp_path / "run").network.config.num_hidden_layers == 1


def test_another_strategy_in_a_finished_folder_is_refused_before_any_work(
    composed: Composed, overrides: list[str], finished: Path
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"finished run with other settings .*temperature was 2.0, now 8"):
        Run(composed(*overrides, "temperature=8", "stages=[baseline]"))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    _, report, _ = run(composed(*overrides, "seeds=2"))
    assert report["seeds"] == [0, 1], "more seeds of the same run are welcome"
    with pytest.raises(ConfigError, match="seeds was 2, now 1"):
        Run(composed(*overrides))


def test_what_does_not_fit_is_refused_before_the_teacher_is_trained(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student"))]
    with pytest.raises(ConfigError, match="wider than the teacher"):
        run(composed(*chosen, "model@student=embeddings_from_teacher", "student.network.embedding_size=64"))
    with pytest.raises(ConfigError, match="needs an encoder of transformers as teacher"):
        run(composed(*chosen, "model@student=from_teacher"))
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_diverged_training_is_one_line(composed: Composed, overrides: list[str]) -> None:
    with pytest.raises(KDError, match=r"baseline, seed 0 diverged.*lower optimizer.lr"):
        run(composed(*overrides, "stages=[teacher,baseline]", "optimizer.lr=1e30", "trainer.gradient_clip_val=null"))


@pytest.mark.parametrize(
    ("distillation", "precision"), [("labels_only", "32-true"), ("hint", "bf16-mixed"), ("rkd", "32-true")]
)  # all: tests/config/test_catalog.py, tests/end_to_end/test_precision.py
def test_a_distillation_trains(composed: Composed, overrides: list[str], distillation: str, precision: str) -> None:
    brief = ["trainer.max_steps=2", "teacher.trainer.max_steps=2", f"trainer.precision={precision}"]
    pipeline, _, _ = run(composed(*overrides, f"distillation={distillation}", *brief))
    record = json.loads((pipeline.folder / "seed_0" / "distill" / "stage.json").read_text())
    assert record["steps"] == 2
    assert all(math.isfinite(score) for score in record["validation"].values())


def test_another_setting_in_the_same_folder_is_refused_and_nothing_is_lost(
    composed: Composed, overrides: list[str], finished: Path
) -> None:
    (finished / "config.yaml").unlink()  # as after a kill: only the finished stages are there
    shutil.rmtree(finished / "seed_0")
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"optimizer.lr was 0.02, now 0.005.*name="):
        run(composed(*overrides, "stages=[teacher]", "teacher.optimizer.lr=0.005"))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match="resume=never"):
        Run(composed(*overrides, "resume=never"))


def test_runs_with_and_without_views_share_teacher_and_baseline(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith(("run_dir", "trainer.max_epochs"))]
    chosen += ["trainer.max_steps=8", f"shared_dir={tmp_path / 'shared'}"]
    folders = []
    for views in (0, 1):
        pipeline, _, _ = run(composed(*chosen, f"data.views={views}", f"run_dir={tmp_path / str(views)}"))
        folders.append({name: (pipeline.folder / name).resolve() for name in ("teacher", "seed_0/baseline")})
    assert folders[0] == folders[1]
    read = [json.loads((tmp_path / f"{views}/seed_0/distill/settings.json").read_text()) for views in (0, 1)]
    assert read[0]["settings"]["data"] != read[1]["settings"]["data"]


def test_what_another_run_has_finished_is_not_in_the_time_that_is_expected(
    composed: Composed, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_lightning.pipeline.estimate.LEAST", 1)
    chosen = [o for o in overrides if not o.startswith(("run_dir", "student", "model@student"))]
    chosen += [*STARTED, f"shared_dir={tmp_path / 'shared'}"]
    first, _, _ = run(composed(*chosen, f"run_dir={tmp_path / 'first'}"))
    assert first.clock is not None
    assert {"teacher", "seed_0/baseline", "seed_0/baseline_initialised"} < set(first.clock.parts)
    second, _, _ = run(composed(*chosen, "temperature=3", f"run_dir={tmp_path / 'second'}"))
    assert second.clock is not None
    assert set(second.clock.parts) == {"seed_0/distill", "report"}
    assert (second.folder / "teacher").resolve() == (first.folder / "teacher").resolve()


def test_a_teacher_that_may_still_be_trained_on_is_not_taken_for_finished(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith("run_dir")] + [f"shared_dir={tmp_path / 'shared'}"]
    first, _, _ = run(composed(*chosen, f"run_dir={tmp_path / 'first'}"))
    checked = (first.folder / "teacher" / "check.json").resolve()
    write_sealed(checked, {**read_json(checked), "done": False})
    second = Run(composed(*chosen, "temperature=3", f"run_dir={tmp_path / 'second'}"), Console(file=StringIO()))
    link_shared(second, plan(second))
    assert not list(second.folder.glob("**/stage.json"))


def test_a_teacher_is_read_again_after_its_check(
    composed: Composed, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been trained on, and its first training read before, by an estimate."""
    before: list[object] = []
    monkeypatch.setattr("kd_lightning.pipeline.run.finish_teacher", lambda run, _: before.append(run.teacher))
    pipeline = Run(composed(*overrides), Console(file=StringIO()))
    train_all(pipeline)
    assert len(before) == 1
    assert pipeline.teacher is not before[0]


def test_the_baseline_starts_where_the_distilled_student_starts_and_takes_nothing_from_the_teacher(
    composed: Composed, overrides: list[str]
) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student"))]
    pipeline = Run(composed(*chosen, *STARTED))
    random = student_of(pipeline, "baseline")
    initialised = student_of(pipeline)
    again = student_of(pipeline)
    assert network_digest(initialised) == network_digest(again)
    equal = {name for name, value in random.state_dict().items() if torch.equal(value, initialised.state_dict()[name])}
    assert set(random.state_dict()) - equal == {"embedding.weight"}, "the teacher gave the embeddings and nothing else"


def test_of_several_teachers_a_student_is_made_from_the_first(composed: Composed, overrides: list[str]) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student"))]
    student = ["model@student=embeddings_from_teacher", "student.network.embedding_size=8"]
    tables = {}
    for teachers in (1, 2):
        more = [
            f"teacher.seeds={teachers}",
            "stages=[teacher,distill]",
            f"run_dir={chosen[-1].partition('=')[2]}{teachers}",
        ]
        pipeline = Run(composed(*chosen, *student, *more))
        tables[teachers] = student_of(pipeline).get_input_embeddings().weight
    torch.testing.assert_close(tables[2], tables[1], rtol=0, atol=0)
    members = [member.network.get_input_embeddings().weight for member in pipeline.teacher.members]
    assert not torch.equal(*members)


def test_a_student_that_reads_other_tokens_is_not_made_from_the_teacher(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student"))]
    chosen += ["model@student=embeddings_from_teacher", "student.network.embedding_size=8"]
    with pytest.raises(ConfigError, match=r"would read other tokens: let both read .*\(data\.tokenizer\)"):
        train_all(Run(composed(*chosen, "data.teacher_tokenizer=wordpiece:90")))
    assert not (tmp_path / "run" / "teacher").exists()
    classifier = [o for o in chosen if not o.startswith(("model@student", "student"))] + [
        "model@student=simkd",
        "distillation=simkd",
    ]
    student = student_of(Run(composed(*classifier, "data.teacher_tokenizer=wordpiece:90")))
    assert student(torch.tensor([[1, 2]])).logits.shape == (1, 3), "it takes the classifier, which reads no tokens"


def test_a_fresh_classifier_is_not_left_untrained(composed: Composed, overrides: list[str], tmp_path: Path) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student"))]
    chosen += ["model@student=simkd", "distillation=simkd", "student.initialise=random"]
    with pytest.raises(ConfigError, match=r"^student\.initialise=random makes a fresh classifier, which distillation="):
        train_all(Run(composed(*chosen)))
    assert not (tmp_path / "run" / "teacher").exists(), "before anything is trained"


def test_baselines_of_students_of_other_teachers_are_no_one_baseline(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    """What a student from random weights is may be the teacher's to say: here its width."""
    left_out = ("student", "model@", "teacher.network", "run_dir")
    chosen = [o for o in overrides if not o.startswith(left_out)]
    chosen += ["model@teacher.network=transformer", "teacher.network.num_layers=2", "teacher.network.num_heads=2"]
    chosen += ["model@student=from_teacher", "student.layers=1", "stages=[teacher,baseline]"]
    chosen += [f"shared_dir={tmp_path / 'shared'}", "trainer.max_steps=2", "teacher.trainer.max_steps=2"]
    folders = set()
    for width in (8, 16):
        more = [f"teacher.network.hidden_size={width}", f"run_dir={tmp_path / str(width)}"]
        train_all(Run(composed(*chosen, *more), Console(file=StringIO())))
        folders.add((tmp_path / str(width) / "seed_0" / "baseline").resolve())
    assert len(folders) == 2


def test_a_student_initialised_from_the_teacher_gets_two_baselines(composed: Composed, overrides: list[str]) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student"))]
    _, report, _ = run(composed(*chosen, *STARTED))
    assert {"baseline", "baseline_initialised", "distilled"} < set(report["models"])


def test_a_student_told_to_start_fresh_is_distilled_so(composed: Composed, overrides: list[str]) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student"))]
    usual = Run(composed(*chosen, *STARTED))
    pipeline, report, _ = run(composed(*chosen, *STARTED, "student.initialise=random"))
    assert set(report["models"]) == {"teacher", "baseline", "distilled"}, "there is no other start to compare with"
    assert network_digest(student_of(pipeline)) == network_digest(student_of(usual, "baseline"))
    stage = json.loads((pipeline.folder / "seed_0/distill/stage.json").read_text())
    assert stage["settings"]["network"]["initialise"] == "random"


def test_pre_distillation_is_a_run_whose_student_another_run_starts_from(
    composed: Composed, overrides: list[str], finished: Path, tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith(("student", "model@student", "run_dir"))]
    chosen += ["model@student=from_run", f"student.checkpoint={finished}", f"run_dir={tmp_path / 'second'}"]
    chosen += ["trainer.max_steps=4", "teacher.trainer.max_steps=4"]
    pipeline = Run(composed(*chosen))
    before = load_file(tmp_path / "run" / "seed_0" / "distill" / "model.safetensors")
    start, fresh = (student_of(pipeline, stage).state_dict() for stage in ("distill", "baseline"))
    assert all(torch.equal(start[name], value) for name, value in before.items())
    assert not all(torch.equal(fresh[name], value) for name, value in before.items())
    own = [o for o in chosen if not o.startswith("data.tokenizer=")]
    assert composed(*own).data.tokenizer == str(tmp_path / "run/seed_0/distill/tokenizer")
    run(composed(*chosen, "stages=[baseline]", f"run_dir={tmp_path / 'labels'}"))  # needs no teacher
    assert (tmp_path / "labels/seed_0/baseline_initialised/stage.json").is_file()
    _, report, _ = run(composed(*chosen))
    assert {"baseline", "baseline_initialised", "distilled"} < set(report["models"])
    (tmp_path / "run/seed_0/distill/model.safetensors").write_bytes(
        (tmp_path / "second/seed_0/distill/model.safetensors").read_bytes()
    )
    finish_stage(tmp_path / "run/seed_0/distill", read_stage(tmp_path / "run/seed_0/distill"))
    with pytest.raises(ConfigError, match=r"baseline_initialised holds a finished training .*start changed"):
        run(composed(*chosen))


def test_averaged_weights_are_kept_where_averaged_weights_are_validated(
    composed: Composed, overrides: list[str]
) -> None:
    average = "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.9}"
    logged = "logger={csv: {_target_: lightning.pytorch.loggers.CSVLogger, name: csv}}"
    pipeline, _, _ = run(composed(*overrides, "stages=[teacher,distill]", average, logged, "validations=3"))
    for stage in ("teacher", "seed_0/distill"):
        kept = json.loads((pipeline.folder / stage / "stage.json").read_text())["validation"]
        (log,) = (pipeline.folder / stage).rglob("metrics.csv")
        with log.open() as file:
            seen = [row for row in csv.DictReader(file) if row["val/accuracy"]]
        best = max(seen, key=lambda row: float(row["val/accuracy"]))
        assert kept["accuracy"] == pytest.approx(float(best["val/accuracy"]))
        assert kept["cross_entropy"] == pytest.approx(float(best["val/loss"]), rel=1e-4)


def test_online_and_cached_teacher_train_the_same_student(
    composed: Composed, overrides: list[str], finished: Path
) -> None:
    place = finished / "seed_0/distill/model.safetensors"
    cached = load_file(place)
    shutil.rmtree(place.parent)
    (finished / "config.yaml").unlink()
    train_all(Run(composed(*overrides, "stages=[teacher,distill]", "teacher.cache=off"), Console(file=StringIO())))
    online = load_file(place)
    for name, tensor in cached.items():
        torch.testing.assert_close(online[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_finished_teacher_is_loaded_by_its_folder(
    composed: Composed, overrides: list[str], finished: Path, tmp_path: Path
) -> None:
    chosen = [o for o in overrides if not o.startswith(("run_dir", "data.tokenizer"))]
    cfg = composed(
        *chosen, f"run_dir={tmp_path / 'next'}", f"teacher.checkpoint={finished}", "stages=[baseline,distill]"
    )
    assert cfg.data.teacher_tokenizer == str(finished / "teacher" / "tokenizer")
    _, report, _ = run(cfg)
    assert report["models"]["teacher"]["test"]["accuracy"]["mean"] > 0.8
    assert not (tmp_path / "next" / "teacher").exists()


def test_a_teacher_with_the_classes_in_another_order_is_refused(
    composed: Composed, overrides: list[str], tmp_path: Path
) -> None:
    teacher = Run(composed(*overrides))
    teacher.data.student_tokenizer.save_pretrained(tmp_path / "hf")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    names = {0: "science", 1: "food", 2: "运动"}
    config = BertConfig(vocab_size=len(teacher.data.student_tokenizer), id2label=names, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "hf")
    chosen = [o for o in overrides if not o.startswith("data.tokenizer")]
    cfg = composed(*chosen, f"teacher.checkpoint={tmp_path / 'hf'}", "stages=[distill]")
    with pytest.raises(ConfigError, match=r"data.class_names=\['science', 'food', '运动'\]"):
        run(cfg)
    ordered = composed(
        *chosen,
        f"teacher.checkpoint={tmp_path / 'hf'}",
        "stages=[distill]",
        "data.class_names=['science','food','运动']",
    )
    _, report, _ = run(ordered)
    assert set(report["models"]) == {"teacher", "distilled"}


def test_no_teacher_is_refused_before_training(composed: Composed, overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher.checkpoint"):
        run(composed(*overrides, "stages=[distill]"))
    assert not (tmp_path / "run" / "seed_0").exists()
