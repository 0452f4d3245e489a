"""Networks that are named and not there are refused before the data are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from omegaconf import DictConfig

from kd_lightning.pipeline import context
from kd_lightning.pipeline.context import Run
from kd_lightning.runtime.errors import KDError
from tests.conftest import tiny_overrides
from tests.models.tiny import tiny

FINISHED = "stages=[distill]"
PRETRAINED = ["model@student=hf", "data.tokenizer=minilm", FINISHED]


class ReadError(Exception):
    """The data are read."""


@pytest.fixture
def refused(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Compose, and return the refusal, which comes before the data."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known\nand more")

    def read(_: object) -> None:
        raise ReadError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(context, "_prepared", read)
    monkeypatch.chdir(tmp_path)

    def make(*given: str) -> str:
        own = ("student", "model@", "teacher.network", *["data"] * given[0].startswith("data="))
        kept = [o for o in tiny_overrides(toy_csv, tmp_path / "run") if not o.startswith(own)]
        with pytest.raises(KDError) as error:
            Run(composed(*kept, *given))
        assert "\n" not in str(error.value)
        return str(error.value)

    return make


@pytest.mark.parametrize("name", ["my_teachr", "./my_teachr", "a/my_teachr", "a/b/c"])
def test_a_teacher_that_is_not_there(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "my_teacher").mkdir()
    (tmp_path / "runs/my_teacher").mkdir(parents=True)
    said = refused(f"teacher.checkpoint={name}", FINISHED)
    assert said.startswith("teacher.checkpoint=")
    assert "no such folder" in said
    assert ("runs/my_teacher" in said) == (name != "a/b/c")
    assert ("my_teacher or runs/my_teacher?" in said) == ("a/" not in name)
    assert "teacher.checkpoint=" in refused(f"teacher.checkpoint=[{name},{name}]", FINISHED)


def test_a_folder_that_holds_no_teacher(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused("teacher.checkpoint=empty", FINISHED).startswith("teacher.checkpoint='empty' is a folder without")
    (tmp_path / "empty/settings.json").write_text("{}")
    assert "empty is unfinished" in refused("teacher.checkpoint=empty", FINISHED)


def test_a_pretrained_network_that_is_not_there(refused: Callable[..., str]) -> None:
    name = "google/bert_uncased_L-2_H-128_A-2x"
    said = refused(*PRETRAINED, f"student.name={name}")
    assert said.startswith(f"student.name={name}: there is no such folder, and no such name on the Hugging Face hub")
    said = refused("model@teacher.network=hf", f"teacher.network.name={name}", "stages=[teacher]")
    assert said.startswith(f"teacher.network.name={name}")
    peer = "{_target_: kd_lightning.models.hf.pretrained, name: nobody/nothing}"
    assert refused(f"peers=[{peer}]", "data.tokenizer=minilm", FINISHED).startswith("peers[0].name=nobody/nothing")


def test_a_run_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "runs/general").mkdir(parents=True)
    said = refused("model@student=from_run", "student.checkpoint=runs/generl", FINISHED)
    assert said == "student.checkpoint=runs/generl: there is no such run folder (did you mean runs/general?)"


def test_an_encoder_that_looks_for_documents_and_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    ranks = ["data=ranking_files", "data.hard_negatives=3", "data.tokenizer=minilm", FINISHED]
    said = refused(*ranks, "data.negatives_by=./encodr")
    wanted = "no such folder; give a folder, minilm or a name on the Hugging Face hub (did you mean encoder?)"
    assert said == f"data.negatives_by='./encodr': {wanted}"
    assert refused(*ranks, "data.negatives_by=no/body").startswith("data.negatives_by=no/body: there is no such folder")
    with pytest.raises(ReadError):
        refused(*ranks, "data.negatives_by=./encodr", "data.hard_negatives=0")


def test_what_is_there_is_not_asked_for_elsewhere(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ReadError):
        refused(*PRETRAINED, "student.name=bert", "teacher.checkpoint=bert")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    with pytest.raises(ReadError):
        refused(*PRETRAINED, "student.name=google/bert", "teacher.checkpoint=bert")
