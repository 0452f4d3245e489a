"""Fingerprints name components by a VERSION, raised by hand: a comment throws no cache away, another meaning does."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from kd_lightning.data import FashionMNIST, TextFiles
from kd_lightning.data.image import store
from kd_lightning.data.image import views as images
from kd_lightning.data.text import augment, tokens
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.rebuild import versions
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches
from kd_lightning.runtime import memoize
from kd_lightning.teachers import frozen
from tests import ROOT
from tests.conftest import tiny_overrides
from tests.data.images import write_fashion
from tests.versions import COMPONENTS, FILE, problem, same

RECORDED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_makes_what_its_version_made(name: str) -> None:
    wrong = problem(COMPONENTS[name], RECORDED.get(name))
    assert wrong is None, wrong


def test_whatever_has_a_version_is_recorded() -> None:
    """A training's is beside the golden figures; what is read of an export and of a GGUF file, others wrote."""
    package = ROOT / "kd_lightning"
    texts = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    found = {name for name, text in texts.items() if re.search(r"^\s*VERSION = \d", text, re.MULTILINE)}
    recorded = {component.file for component in COMPONENTS.values()}
    assert found - recorded == {"training/stage.py", "export/exported.py", "runtime/gguf.py"}


def test_another_meaning_and_another_version_are_noticed() -> None:
    views, recorded = COMPONENTS["views"], RECORDED["views"]
    altered = replace(views, make=lambda: [*views.make()[1:], []])
    assert "raise VERSION there" in (problem(altered, recorded) or "")
    assert "record what it makes now" in (problem(replace(views, version=2), recorded) or "")
    assert problem(views, None) is not None
    assert same({"a": [1.0, 2]}, {"a": [1.0001, 2]}, 1e-3)
    assert not same({"a": [1.0, 2]}, {"a": [1.01, 2]}, 1e-3)
    assert not same([1.0, 2.0], [1.0], 1e-3)


def of_texts(folder: Path, sets: int | None) -> TextFiles:
    (folder / "toy.csv").write_text("text,label\n" + "".join(f"word{i % 7} and {i},{'ab'[i % 2]}\n" for i in range(80)))
    data = TextFiles(str(folder / "toy.csv"), tokenizer="wordpiece:80", views=1, view_sets=sets)
    data.prepare()
    return data


def of_images(folder: Path) -> FashionMNIST:
    data = FashionMNIST(str(write_fashion(folder / "fashion")), train_examples=40, views=1)
    data.prepare()
    return data


@pytest.mark.parametrize(
    ("module", "make", "reaches_teacher"),
    [
        (tokens, lambda folder: of_texts(folder, 1), True),
        (augment, lambda folder: of_texts(folder, None), False),  # no teacher's outputs are kept of such views
        (store, of_images, True),
        (images, of_images, True),
    ],
    ids=["tokens", "views", "pixels", "image views"],
)
def test_a_version_reaches_the_names_of_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_home: Path,
    module: ModuleType,
    make: Callable[[Path], Any],
    reaches_teacher: bool,
) -> None:
    before, again = make(tmp_path), make(tmp_path)
    assert (before.fingerprint, before.teacher_key) == (again.fingerprint, again.teacher_key)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    after = make(tmp_path)
    assert after.fingerprint != before.fingerprint
    assert (after.teacher_key != before.teacher_key) == reaches_teacher


def test_a_network_has_the_versions_of_its_classes() -> None:
    class Own(nn.Module):
        VERSION = 3

    whole = nn.Sequential(BiLSTM(2, 30, embedding_size=4, hidden_size=4), Own(), nn.ReLU())
    assert versions(whole) == {"BiLSTM": BiLSTM.VERSION, Own.__qualname__: 3}


OWN = """
import torch

class Own(torch.nn.Module):
    {body}

    def __init__(self, num_classes, vocab_size):
        super().__init__()
        self.table = torch.nn.EmbeddingBag(vocab_size, num_classes)

    def forward(self, input_ids):
        return self.table(input_ids)
"""


def test_a_comment_throws_no_cache_away_and_another_meaning_does(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    small = tiny_overrides(toy_csv, tmp_path / "run")
    small = [one for one in small if not one.startswith(("model@teacher", "teacher.network."))]
    overrides = ["model@teacher.network=custom", "teacher.network._target_=own_network.Own", "teacher.seed=1"]

    def cache(body: str) -> Path:
        """Return where the outputs of a teacher of one's own are stored, by a class with this body."""
        (tmp_path / "own_network.py").write_text(OWN.format(body=body))
        sys.modules.pop("own_network", None)
        importlib.invalidate_caches()
        memoize._KEPT.clear()
        [folder] = build_caches(Run(composed(*small, *overrides), Console(file=StringIO())))
        return folder

    first = cache("VERSION = 1")
    assert cache("VERSION = 1  # a comment, and no more") == first
    second = cache("VERSION = 20")
    assert second != first
    monkeypatch.setattr(frozen, "VERSION", frozen.VERSION + 1)
    assert cache("VERSION = 20") not in (first, second)
    sys.modules.pop("own_network", None)
