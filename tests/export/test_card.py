"""The model card is one that the Hugging Face hub can read, and says where the student is from. The hub takes it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from omegaconf import OmegaConf

from kd_lightning.cli.export import main as kd_export
from kd_lightning.evaluation.report.build import SCHEMA_VERSION
from kd_lightning.export import parity
from kd_lightning.export.card import card
from kd_lightning.export.exported import read_exported
from kd_lightning.export.history import History, Origin, start_of, teacher_of
from kd_lightning.export.hub import push_to_hub
from kd_lightning.export.source import find_student, open_source
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.fingerprints import write_json
from kd_lightning.tasks import Regression
from kd_lightning.training.run_folder import finish_stage
from tests.export.conftest import Exports
from tests.names import HOSTILE


class LocalHub:
    """A hub that is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, name: str, private: bool, exist_ok: bool, repo_type: str) -> str:
        if name.startswith("their/"):
            raise HFValidationError(f"{name} is not yours\nread the manual")
        assert exist_ok
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return f"file://{self.folder / name}"

    def upload_folder(self, repo_id: str, folder_path: str, repo_type: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


@pytest.fixture
def exported(bert: Path, tmp_path: Path) -> Path:
    run = tmp_path / "reviewed"
    shutil.copytree(bert, run)
    models = {"teacher": 0.875, "baseline": 0.75, "distilled": 0.8125}
    scores = {name: {"test": {"accuracy": {"values": [v]}, "ece": {"values": [0.03]}}} for name, v in models.items()}
    report = {"command": "kd-train experiment=x", "seeds": [0], "models": scores, "schema_version": SCHEMA_VERSION}
    write_json(run / "report.json", report)
    kd_export([str(run), "--format", "huggingface", "--quantize", "fp16", "--out", str(tmp_path / "out")])
    return tmp_path / "out"


def test_the_card(exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "text-classification"
    assert data["library_name"] == "transformers"
    assert {"knowledge-distillation", "huggingface", "fp16"} <= set(data["tags"])
    assert "base_model" not in data, "it shares no weight with its teacher"
    assert card.data.eval_results[0].metric_value == 0.8125
    for said in (
        "0.812 (0.681 to 0.898)", "all-MiniLM-L6-v2, Apache-2.0", "kd-train experiment=x", "kd-export",
        "food / science", "168 train, 24 validation, 48 test", "temperature", "licence not recorded",
        "Text beyond 32 tokens", "the same label for",
        "parameters, distilled with kd_lightning", "| teacher | 0.875 (", "| student from labels | 0.750 (",
        "| this student (float32) | 0.812 (", "initialised with random weights",
    ):  # fmt: skip
        assert said in card.text, said


Written = Callable[..., ModelCard]


@pytest.fixture
def card_of(bilstm: Path, tmp_path: Path) -> Written:
    """Return the card of a student whose run differs from `bilstm` in what is given."""

    def make(stage: str = "distill", network: dict[str, Any] | None = None, **config: Any) -> ModelCard:
        run = tmp_path / "run"
        shutil.copytree(bilstm, run)
        if stage != "distill":
            shutil.copytree(run / "seed_0" / "distill", run / "seed_0" / stage)
        for folder in (run / "seed_0").iterdir():
            record = json.loads((folder / "stage.json").read_text())
            record["settings"]["network"] = network or record["settings"]["network"]
            finish_stage(folder, record)
        whole = OmegaConf.merge(OmegaConf.load(run / "config.yaml"), config)
        OmegaConf.save(whole, run / "config.yaml")
        out = tmp_path / "out"
        kd_export([str(run / "seed_0" / stage), "--format", "safetensors", "--out", str(out)])
        return ModelCard.load(out / "README.md")

    return make


def test_a_baseline_is_not_called_distilled(card_of: Written) -> None:
    card = card_of("baseline", data={"views": 1})
    assert "views" not in card.text, "it was trained without them"
    assert "parameters, trained from labels alone, without a teacher, with kd_lightning" in card.text
    assert "teacher: none" in card.text
    assert "distil" not in card.text
    assert "loss terms" not in card.text
    assert "Its teacher's errors" not in card.text
    assert "knowledge-distillation" not in card.data.to_dict()["tags"]


def test_a_fine_tuned_student_names_both_trainings(card_of: Written) -> None:
    text = card_of("finetune").text
    assert "distilled, then fine-tuned from labels, with kd_lightning" in text
    assert "stage `distill`: 7 optimizer steps" in text
    assert "stage `finetune`: 7 optimizer steps" in text


def test_a_run_that_taught_is_followed_to_what_it_was_pretrained_as(card_of: Written, bert: Path) -> None:
    card = card_of(teacher={"checkpoint": str(bert), "network": {"name": "something/else"}})
    assert f"teacher: {bert}, which is all-MiniLM-L6-v2, Apache-2.0, fine-tuned" in card.text
    assert "something/else" not in card.text


def test_a_teacher_is_found_from_another_folder_than_the_run_was_started_in(
    card_of: Written, bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert, tmp_path / "runs" / "above")
    assert not Path("runs/above").exists()
    card = card_of(teacher={"checkpoint": "runs/above"})
    assert "teacher: runs/above, which is all-MiniLM-L6-v2, Apache-2.0, fine-tuned" in card.text


def test_a_baseline_that_began_with_its_teachers_weights(card_of: Written) -> None:
    started = {"_target_": "kd_lightning.models.from_teacher.from_teacher", "layers": 2, "initialise": "teacher"}
    card = card_of("baseline_initialised", network=started)
    assert "trained from labels alone, from weights of a teacher, with kd_lightning" in card.text
    assert card.data.to_dict()["license"] == "apache-2.0"


def test_weights_of_the_teacher_are_said_to_be_derived(card_of: Written, bert: Path) -> None:
    started = {"_target_": "kd_lightning.models.from_teacher.from_teacher", "layers": 2, "initialise": "teacher"}
    card = card_of(network=started, teacher={"checkpoint": str(bert)})
    assert "initialised from weights of its teacher" in card.text
    assert "it is derived from these weights" in card.text
    data = card.data.to_dict()
    assert (data["license"], data["base_model"]) == ("apache-2.0", ["sentence-transformers/all-MiniLM-L6-v2"])


def test_a_student_that_goes_on_from_another_runs_says_so(card_of: Written, bert: Path) -> None:
    text = card_of(network={"_target_": "x.from_run", "checkpoint": str(bert), "initialise": "teacher"}).text
    assert f"initialised from the student of {bert / 'seed_0' / 'distill'}" in text
    assert "itself distilled from all-MiniLM-L6-v2, Apache-2.0" in text


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"checkpoint": ["BERT", "me/mine"]}, "an ensemble of 2: BERT, which is all-MiniLM-L6-v2"),
        ({"seeds": 3}, "an ensemble of 3, trained with 3 seeds: all-MiniLM-L6-v2, Apache-2.0"),
        ({"folds": 4}, "an ensemble of 4, each without one of 4 folds of the training examples: all-MiniLM-L6-v2"),
        ({"ema": 0.99}, "the average of the student's own weights"),
    ],
)
def test_several_teachers_are_an_ensemble(card_of: Written, bert: Path, teacher: dict[str, Any], says: str) -> None:
    given = teacher.get("checkpoint", [])
    teacher = {**teacher, "checkpoint": [one.replace("BERT", str(bert)) for one in given]} if given else teacher
    assert f"teacher: {says.replace('BERT', str(bert))}" in card_of(teacher=teacher).text


@pytest.mark.parametrize(
    ("teacher", "says", "names"),
    [
        ({"seeds": 3}, "weights of the first of its teachers (all-MiniLM-L6-v2", ("minilm",)),
        ({"checkpoint": ["me/mine", "you/yours"]}, "weights of the first of its teachers (me/mine", ("me/mine",)),
        ({"seeds": 1}, "weights of its teacher (all-MiniLM-L6-v2", ("minilm",)),
    ],
)
def test_of_several_teachers_the_first_gave_its_weights(
    tmp_path: Path, teacher: dict[str, Any], says: str, names: tuple[str, ...]
) -> None:
    finish_stage(tmp_path, {"settings": {"network": {"initialise": "teacher"}}})
    above = teacher_of({"teacher": {"network": {"name": "minilm"}, **teacher}, "stages": ["teacher"]}, tmp_path)
    found = start_of(tmp_path, above)
    assert found is not None
    assert found.text.startswith(says)
    assert found.names == names


def test_a_student_that_rates(rating: Path, exports: Exports) -> None:
    card = ModelCard.load(exports(rating, "onnx") / "README.md")
    data = card.data.to_dict()
    assert (data["pipeline_tag"], data["language"]) == ("text-classification", "en")
    assert "regression" in data["tags"]
    assert "`logits` has one column, which is the score (rating): no softmax, no sigmoid" in card.text
    assert "It gives a number" in card.text
    assert "predicts one of them" not in card.text
    assert "licence not recorded" not in card.text


def test_a_student_of_several_tasks(several: Path, exports: Exports) -> None:
    card = ModelCard.load(exports(several, "onnx") / "README.md")
    assert "pipeline_tag" not in card.data.to_dict()
    assert "(domain: classes, columns 0-3; rating: a score, column 4)" in card.text
    assert "teacher: one for each task. domain: all-MiniLM-L6-v2, Apache-2.0, fine-tuned; rating: all-" in card.text


def test_a_student_that_reads_images(pictures: Path, exports: Exports) -> None:
    card = ModelCard.load(exports(pictures, "onnx") / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"
    assert "RGB images of 16 x 16 pixels, preprocessed as `images` in `export.json`" in card.text
    assert "token" not in card.text
    assert "language" not in card.text


def test_intervals_hold_the_score_and_shrink_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_lightning.export.parity.RESAMPLES", 400)
    generator, widths = torch.Generator().manual_seed(0), []
    for n in (100, 1600):
        labels = torch.randn(n, generator=generator)
        logits = (labels + torch.randn(n, generator=generator)).reshape(-1, 1)
        sampled = parity._Parts(Regression(), parity.PARTS // 4)
        for rows in torch.arange(n).chunk(4):
            sampled.add(logits[rows], {"labels": labels[rows]})
        assert len(sampled.states) == min(n, parity.PARTS)
        low, high = sampled.intervals()["rmse"] or (0, 0)
        assert low < 1 < high, "the noise's deviation is 1"
        widths.append(high - low)
        assert high - low == pytest.approx(2 * 1.96 / (2 * n) ** 0.5, rel=0.25), "of a normal deviation in theory"
    assert widths[1] < widths[0]


def test_the_hub_gets_the_whole_folder(exported: Path, tmp_path: Path) -> None:
    place = push_to_hub(exported, "me/student", api=LocalHub(tmp_path / "hub"))
    assert place.endswith("hub/me/student")
    there = {path.name for path in (tmp_path / "hub" / "me" / "student").iterdir()}
    assert there == {path.name for path in exported.iterdir()} >= {"README.md", "config.json", "model.safetensors"}


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(
        KDError, match=r"is written, but not uploaded to the hub as their/student: their/student is not yours"
    ) as e:
        push_to_hub(exported, "their/student", api=LocalHub(tmp_path / "hub"))
    assert "\n" not in str(e.value)
    assert (exported / "README.md").is_file()


def test_a_hub_that_is_not_there_is_one_line_too(exported: Path) -> None:
    with pytest.raises(KDError, match=r"is written, but not uploaded to the hub as me/student: .*refused") as e:
        push_to_hub(exported, "me/student", api=HfApi(endpoint="http://127.0.0.1:9", token="none"))
    assert "\n" not in str(e.value)


def test_names_in_a_card_are_text(exported: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = open_source(find_student(bert)), read_exported(exported)
    for name in HOSTILE:
        run = History(source)
        run.config |= {"name": name, "temperature": name, "distillation": {"terms": {name: 1}}}
        run.report = {"command": name, "seeds": [0], "models": {}}
        run.distilled, run.teacher, run.start = True, Origin(name), Origin(name)
        monkeypatch.setattr(type(run.data), "title", name)
        for predicts in (made.predicts, "regression", {name: "regression", "b": 2}):
            parity = {**made.parity, "student": made.parity["student"] if predicts == made.predicts else {}}
            changes = (
                {"format": "safetensors"} if isinstance(predicts, dict) else {}
            )  # transformers has no several tasks
            changes |= {"class_names": [name, "b"], "command": name, "predicts": predicts, "parity": parity}
            text = card(replace(made, **changes), run)
            body = text.split("\n---\n", 1)[1]
            assert text.replace("\n", "").isprintable(), ascii(name)
            assert "<" not in body
            assert not re.search(r"(?<!\\)(\\\\)*\]\(http", re.sub(r"`` .*? ``|`[^`\n]+`", "", body)), name
            text.encode()
