"""The model card is one that the Hugging Face hub can read, and says where the student is from. The hub takes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError

from kd_lightning.errors import KDError
from kd_lightning.export.command import main as kd_export
from kd_lightning.export.hub import push_to_hub
from kd_lightning.runs import write_json


class LocalHub:
    """A hub that is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, name: str, private: bool, exist_ok: bool, repo_type: str) -> str:
        if "/" not in name:
            raise HFValidationError(f"{name} is no repository\nread the manual")
        assert exist_ok
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return f"file://{self.folder / name}"

    def upload_folder(self, repo_id: str, folder_path: str, repo_type: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


@pytest.fixture
def exported(bert: Path, tmp_path: Path) -> Path:
    run = tmp_path / "reviewed"
    shutil.copytree(bert, run)
    scores: dict[str, Any] = {"accuracy": {"values": [0.8125]}, "ece": {"values": [0.03]}}
    report = {"command": "kd-train experiment=x", "seeds": [0], "models": {"distilled": {"test": scores}}}
    write_json(run / "report.json", report)
    kd_export([str(run), "--format", "huggingface", "--quantize", "fp16", "--out", str(tmp_path / "out")])
    return tmp_path / "out"


def test_the_card(exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "text-classification"
    assert data["library_name"] == "transformers"
    assert {"knowledge-distillation", "huggingface", "fp16"} <= set(data["tags"])
    assert card.data.eval_results[0].metric_value == 0.8125
    for said in (
        "0.812 (0.681 to 0.898)", "all-MiniLM-L6-v2, Apache-2.0", "kd-train experiment=x", "kd-export",
        "food / science", "168 train, 24 validation, 48 test", "temperature", "licence not recorded",
        "What comes after 32 tokens", "the same label for",
    ):  # fmt: skip
        assert said in card.text, said


def test_the_hub_gets_the_whole_folder(exported: Path, tmp_path: Path) -> None:
    place = push_to_hub(exported, "me/student", api=LocalHub(tmp_path / "hub"))
    assert place.endswith("hub/me/student")
    there = {path.name for path in (tmp_path / "hub" / "me" / "student").iterdir()}
    assert there == {path.name for path in exported.iterdir()} >= {"README.md", "config.json", "model.safetensors"}


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(
        KDError, match=r"is written, but the hub did not take it as student: student is no repository"
    ) as e:
        push_to_hub(exported, "student", api=LocalHub(tmp_path / "hub"))
    assert "\n" not in str(e.value)
    assert (exported / "README.md").is_file()
