"""Teachers that were each trained without a fold: who answers about what, and a whole run with them."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from kd_lightning.cli.lightning_config import files
from kd_lightning.data import FashionMNIST, TextFiles
from kd_lightning.pipeline.compare import compare
from kd_lightning.pipeline.context import Run
from kd_lightning.pipeline.run import build_caches, train_all
from kd_lightning.runtime import memoize
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.teachers import CalibratedTeacher, CrossFittedTeacher, FrozenTeacher, fit_temperature
from kd_lightning.teachers.ensemble import Combine
from kd_lightning.types import Batch, ModelOutput
from tests.conftest import tiny_overrides
from tests.data.images import write_fashion
from tests.whole_split import outputs_of


class Says:
    """A teacher that answers from a table, and remembers what it was asked."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.asked = logits, []  # type: ignore[var-annotated]

    def __call__(self, batch: Batch) -> ModelOutput:
        self.asked += batch["index"].tolist()
        return ModelOutput(self.logits[batch["index"]])

    def to(self, device: torch.device) -> Says:
        return self

    def flush(self) -> None:
        """Nothing to write."""


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_who_answers_about_what(combine: Combine) -> None:
    torch.manual_seed(0)
    members = [Says(torch.randn(8, 4)) for _ in range(3)]
    folds = torch.tensor([0, 1, 2, 0, -1, -1, 1, 2])
    batch = {"index": torch.tensor([5, 3, 0, 6, 4, 1])}
    logits = CrossFittedTeacher(members, folds, combine)(batch).logits  # type: ignore[arg-type]
    for row, index in enumerate(batch["index"].tolist()):
        said = torch.stack([member.logits[index] for member in members])
        if folds[index] >= 0:
            expected = said[folds[index]].softmax(0)
        elif combine == "logits":
            expected = said.mean(0).softmax(0)
        else:
            expected = said.softmax(1).mean(0)
        torch.testing.assert_close(logits[row].softmax(0), expected)
        if combine == "probabilities":  # all rows on one scale, for losses that compare logits
            torch.testing.assert_close(logits[row], expected.log())
    assert [member.asked for member in members] == [[5, 3, 0, 4], [5, 6, 4, 1], [5, 4]]


def test_a_batch_of_one_fold_only() -> None:
    members = [Says(torch.tensor([[number, 0.0]] * 4)) for number in range(2)]
    teacher = CrossFittedTeacher(members, torch.tensor([1, 1, 0, -1]))  # type: ignore[arg-type]
    said = teacher({"index": torch.tensor([0, 1])}).logits
    torch.testing.assert_close(said, torch.tensor([[1.0, 0.0]] * 2).log_softmax(1))
    assert members[0].asked == []


@pytest.fixture
def make(toy_csv: Path, own_home: Path) -> Callable[..., TextFiles]:
    return lambda **options: TextFiles(str(toy_csv), tokenizer="wordpiece:200", **options)


def test_folds_of_texts(make: Callable[..., TextFiles]) -> None:
    data = make(views=2, view_sets=2, mask_probability=0, ngram_probability=0, drop_probability=0)
    folds = data.folds(3)
    train = data.sizes["train"]
    assert np.ptp(np.bincount(folds[:train])) <= 1
    for label in range(3):  # the classes in their proportion
        assert np.ptp(np.bincount(folds[:train][data._labels[:train] == label])) <= 2
    views = folds[train : 5 * train].reshape(2, train, 2)
    assert (views == folds[:train, None]).all()
    tokens = {}
    for batch in data.all_dataloader():
        tokens |= {
            int(index): row[row != 0].tolist() for index, row in zip(batch["index"], batch["input_ids"], strict=True)
        }
    for view in range(train, 5 * train):  # which are unaltered here: these are the sentences that they are of
        assert tokens[view] == tokens[(view - train) % (2 * train) // 2]
    assert (folds[5 * train :] == -1).all()
    assert (make(views=2, view_sets=2).folds(3) == folds).all()
    assert (data.folds(2)[:train] >= 0).all()


def test_training_without_a_fold(make: Callable[..., TextFiles]) -> None:
    data = make(batch_size=7)
    folds = data.folds(3)
    seen = []
    for fold in range(3):
        part = data.select(pool=False).without_fold(fold, 3).with_batches(seed=fold)
        index = torch.cat([batch["index"] for batch in part.train_dataloader()])
        assert sorted(index.tolist()) == np.flatnonzero((folds >= 0) & (folds != fold)).tolist()
        assert sum(len(batch["index"]) for batch in part.val_dataloader()) == data.sizes["validation"]
        seen.append(part.fingerprint)
    data.split_seed += 1
    seen.append(data.without_fold(2, 3).fingerprint)
    assert len({data.fingerprint, *seen}) == 5, "also where only the dealing out differs"


def test_views_of_images_go_with_them(tmp_path: Path, own_home: Path) -> None:
    data = FashionMNIST(folder=str(write_fashion(tmp_path / "images", train=100)), views=2, batch_size=10)
    folds = data.folds(5)
    index = torch.cat([batch["index"] for batch in data.without_fold(3, 5).train_dataloader()])
    assert sorted(index.tolist()) == np.flatnonzero((folds >= 0) & (folds != 3)).tolist()


def test_what_data_refuse(make: Callable[..., TextFiles]) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.folds=1000, but there are \d+ training examples"):
        make().folds(1000)
    with pytest.raises(ConfigError, match=r"teacher\.folds=2: data\.view_sets=null creates views without an index"):
        make(views=1, view_sets=None).folds(2)


@pytest.mark.parametrize(
    "override", ["teacher.seeds=2", "teacher.weights=[1,2]", "teacher.checkpoint=some", "teacher.features=[pooled]"]
)
def test_what_folds_exclude(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path, override: str
) -> None:
    base = tiny_overrides(toy_csv, tmp_path / "run")
    key = override.partition("=")[0].replace(".", r"\.")
    with pytest.raises(ConfigError, match=rf"teacher\.folds=2 trains that many teachers.*leave out {key}"):
        Run(composed(*base, "teacher.folds=2", override))
    with pytest.raises(ConfigError, match=r"teacher\.folds=0 must be at least 1"):
        Run(composed(*base, "teacher.folds=0"))


def test_a_run_with_a_cross_fitted_teacher(
    composed: Callable[..., DictConfig], toy_csv: Path, tmp_path: Path, own_home: Path
) -> None:
    memoize._KEPT.clear()
    base = [*tiny_overrides(toy_csv, tmp_path / "run"), "teacher.folds=3", "teacher.calibrate=true", "data.views=1"]
    pipeline = Run(composed(*base), Console(file=StringIO()))
    train_all(pipeline)
    folders = [tmp_path / "run" / name for name in ("teacher", "teacher_1", "teacher_2")]
    assert all((folder / "stage.json").is_file() for folder in folders)
    labelled = pipeline.data.select(tokens="teacher", pool=False)
    for number, folder in enumerate(folders):
        assert read_json(folder / "settings.json")["settings"]["data"] == labelled.without_fold(number, 3).fingerprint
    provider = pipeline.providers[0]
    assert build_caches(pipeline) == [provider.cache(pipeline.teacher).folder], "one for all"
    names = [path.name for path in (own_home / "teacher_outputs").iterdir() if path.is_dir()]
    assert names == [build_caches(pipeline)[0].name]
    report = compare(pipeline, "")
    assert report["models"]["teacher"]["title"] == "3 teachers"
    data = pipeline.data.select(tokens="teacher")
    folds = data.folds(3)
    asked = pipeline.predicting_teacher
    assert isinstance(asked, CalibratedTeacher)
    said = outputs_of(asked.inner, data.all_dataloader())
    train = data.sizes["train"]
    assert (folds[:train] >= 0).all()
    assert (folds[train : 2 * train] == folds[:train]).all(), "views are answered by who has not seen their sentence"
    assert asked.temperature == pytest.approx(fit_temperature(said.logits[:train], said.labels[:train]), rel=1e-3)
    alone = [outputs_of(FrozenTeacher(member.network), data.all_dataloader()) for member in pipeline.teacher.members]
    for row, fold in enumerate(folds):
        own = [one.logits[row].softmax(0) for one in alone]
        expected = own[fold] if fold >= 0 else torch.stack(own).mean(0)
        torch.testing.assert_close(said.logits[row].softmax(0), expected, rtol=1e-4, atol=1e-5)
    key = provider._key(pipeline.teacher)
    provider.data = data.with_batches()
    assert provider._key(pipeline.teacher) == key
    provider.data.split_seed += 1
    assert provider._key(pipeline.teacher) != key, "others would answer"
    with pytest.raises(ConfigError, match=r"teacher\.folds=3: kd-cli"):
        list(files(pipeline))
    with pytest.raises(ConfigError, match=r"finished run with other settings \(teacher\.calibrate"):
        Run(composed(*base, "teacher.calibrate=false"))
