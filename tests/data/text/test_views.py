"""Views that change from epoch to epoch, and what a teacher's outputs depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from kd_lightning.data import TextFiles
from kd_lightning.data.sampler import BucketBatchSampler
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import IGNORE, Batch

TRAIN = 84  # of the 120 toy sentences
SETS = [1, 2, 3, None]


@pytest.fixture
def make(toy_csv: Callable[..., Path], tmp_path: Path) -> Callable[..., TextFiles]:
    (tmp_path / "more.txt").write_text("more of the same\nand still more\n")
    given = {"train_file": str(toy_csv()), "tokenizer": "wordpiece:200", "transfer": [str(tmp_path / "more.txt")]}
    return lambda **options: TextFiles(**(given | {"views": 2, "batch_size": 8, "seed": 3} | options))


def epoch_of(data: TextFiles, epoch: int) -> list[Batch]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, BucketBatchSampler)
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def rows(batches: list[Batch], prefix: str = "") -> list[tuple[int, tuple[int, ...]]]:
    """The index and the tokens of each example."""
    return [
        (int(i), tuple(row[mask == 1].tolist()))
        for batch in batches
        for i, row, mask in zip(
            batch["index"], batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], strict=True
        )
    ]


def test_one_set_is_what_it_was(make: Callable[..., TextFiles]) -> None:
    data = make()
    for epoch in range(2):
        assert sorted(i for i, _ in rows(epoch_of(data, epoch))) == list(range(3 * TRAIN + 2))


def test_sets_take_turns(make: Callable[..., TextFiles]) -> None:
    data = make(view_sets=3)
    fixed = [*range(TRAIN), 7 * TRAIN, 7 * TRAIN + 1]
    for epoch in range(4):
        start = TRAIN + epoch % 3 * 2 * TRAIN
        assert sorted(i for i, _ in rows(epoch_of(data, epoch))) == sorted([*fixed, *range(start, start + 2 * TRAIN)])
    assert data.sizes == {"train": TRAIN, "views": 6 * TRAIN, "transfer": 2, "validation": 12, "test": 24}
    assert sorted(i for i, _ in rows(list(data.all_dataloader()))) == list(range(data.num_examples))
    assert {i for i, _ in rows(epoch_of(data.select(pool=False), 1))} == set(range(TRAIN))
    real = sum(int(batch["attention_mask"].sum()) for batch in epoch_of(data, 1))
    assert sum(batch["attention_mask"].numel() for batch in epoch_of(data, 1)) < 1.1 * real


@pytest.mark.parametrize("teacher_tokenizer", [None, "wordpiece:75"])
def test_fresh_views_are_those_of_ever_more_sets(make: Callable[..., TextFiles], teacher_tokenizer: str | None) -> None:
    stored, fresh = (make(view_sets=sets, teacher_tokenizer=teacher_tokenizer) for sets in (3, None))
    assert len(stored.train_dataloader()) == len(fresh.train_dataloader())
    for epoch in range(3):
        made = epoch_of(fresh, epoch)
        for prefix in ("", "teacher_") if teacher_tokenizer else ("",):
            expected, found = rows(epoch_of(stored, epoch), prefix), rows(made, prefix)
            assert sorted(tokens for _, tokens in found) == sorted(tokens for _, tokens in expected)
            known = dict(rows(list(fresh.all_dataloader()), prefix))
            assert all(known[i] == tokens for i, tokens in found if i >= 0)
        index = torch.cat([batch["index"] for batch in made])
        labels = torch.cat([batch["labels"] for batch in made])
        assert int((index == -1).sum()) == 2 * TRAIN
        assert (labels[index == -1] == IGNORE).all()
        assert (labels[(index >= 0) & (index < TRAIN)] != IGNORE).all()
        assert all(entry.dtype == torch.int64 for batch in made for entry in batch.values())
    assert fresh.num_examples == TRAIN + 2 + 36
    assert rows(epoch_of(fresh, 0)) == rows(epoch_of(fresh, 0))
    assert {i for i, _ in rows(epoch_of(fresh.select(pool=False), 1))} == set(range(TRAIN))


def test_fresh_views_of_pairs(write_csv: Callable[..., Path]) -> None:
    lines = [(f"first of many {i}", f"second, {i * 7}", str(i % 2)) for i in range(60)]
    path = write_csv("pairs.csv", lines, header=("a", "b", "label"))
    options: dict[str, Any] = {"text_column": "a", "text_pair_column": "b", "views": 1, "tokenizer": "wordpiece:200"}
    stored, fresh = (TextFiles(str(path), view_sets=sets, **options) for sets in (1, None))
    types = [
        sorted(
            (tuple(row.tolist()), tuple(kind.tolist()))
            for batch in epoch_of(data, 0)
            for row, kind in zip(batch["input_ids"], batch["token_type_ids"], strict=True)
            for row, kind in [(row[row != 0], kind[row != 0])]
        )
        for data in (stored, fresh)
    ]
    assert types[0] == types[1]


def test_repeatable_says_whether_all_can_be_looked_up(make: Callable[..., TextFiles]) -> None:
    assert [make(view_sets=sets).repeatable for sets in SETS] == [True, True, True, False]
    assert make(view_sets=None, views=0).repeatable
    with pytest.raises(ConfigError, match=r"data\.view_sets=0: expected 1 or more"):
        make(view_sets=0)


def test_the_fingerprint_follows_what_the_sets_do(make: Callable[..., TextFiles]) -> None:
    changes: list[dict[str, Any]] = [*({"view_sets": sets} for sets in SETS), {"view_sets": None, "split_seed": 1}]
    changes += [{"view_sets": None, "views": 1}, {"view_sets": None, "mask_probability": 0.3}]
    prints = []
    for change in changes:
        data = make(**change)
        data.prepare()
        prints.append(data.fingerprint)
    assert len(set(prints)) == len(prints)
    none = [make(views=0, view_sets=sets) for sets in SETS]
    for data in none:
        data.prepare()
    assert len({data.fingerprint for data in none}) == 1


def test_what_is_trained_without_the_pool_does_not_depend_on_it(make: Callable[..., TextFiles]) -> None:
    bare, many, few = make(views=0, transfer=[]), make(views=3, view_sets=2), make(pool_ratio=0.5, view_sets=None)
    for data in (bare, many, few):
        data.prepare()
    assert len({data.fingerprint for data in (bare, many, few)}) == 3
    assert {data.select(pool=False).fingerprint for data in (bare, many, few)} == {bare.fingerprint}
    assert many.select(pool=False).select(pool=True).fingerprint == many.fingerprint
    folded = {(data is many, fold): data.without_fold(fold, 2) for data in (bare, many) for fold in (0, 1)}
    assert len({data.fingerprint for data in folded.values()}) == 4
    without = {key: data.select(pool=False).fingerprint for key, data in folded.items()}
    assert without[False, 0] == without[True, 0] != without[True, 1] == without[False, 1]
    for which, (data, selected) in {"before": (many, True), "after": (many, False)}.items():
        found = data.select(pool=False).without_fold(0, 2) if selected else data.without_fold(0, 2).select(pool=False)
        assert found.fingerprint == without[True, 0], which


class Recorder(L.LightningModule):
    """Notes the tokens of each batch it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[Any]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append([batch["index"].tolist(), batch["input_ids"].tolist()])
        return self.weight * batch["input_ids"].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def fit(data: TextFiles, callbacks: list[Any] | None = None, ckpt_path: Path | None = None) -> list[list[Any]]:
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("sets", [2, None])
def test_resumed_in_mid_epoch_with_the_same_views(
    make: Callable[..., TextFiles], tmp_path: Path, sets: int | None, workers: int
) -> None:
    epoch = len(make(view_sets=sets).train_dataloader())

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step in (epoch, epoch + 5, 2 * epoch + 1):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole = fit(make(view_sets=sets), [Save()])
    assert len(whole) == 3 * epoch
    for step in (epoch, epoch + 5, 2 * epoch + 1):
        assert fit(make(view_sets=sets, num_workers=workers), ckpt_path=tmp_path / f"{step}.ckpt") == whole[step:]
    with pytest.raises(ConfigError, match="cannot resume: the data's fingerprint"):
        fit(make(), ckpt_path=tmp_path / f"{epoch}.ckpt")


@pytest.mark.parametrize("sets", [2, None])
def test_ranks_share_the_views_of_an_epoch(make: Callable[..., TextFiles], sets: int | None) -> None:
    data = make(view_sets=sets)
    alone = data.train_dataloader()
    dataset = alone.dataset
    samplers = [
        BucketBatchSampler(dataset.turn, 4, shuffle=True, seed=3, rank=rank, world_size=2)  # type: ignore[attr-defined]
        for rank in (0, 1)
    ]
    for epoch in (0, 1):
        for sampler in (*samplers, alone.sampler):
            sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for whole, *parts in zip(alone.sampler, *samplers, strict=True):
            assert sorted(np.concatenate(parts)) == sorted(whole)  # type: ignore[arg-type]


def test_teacher_key_is_what_decides_a_teachers_outputs(
    make: Callable[..., TextFiles], toy_csv: Callable[..., Path], tmp_path: Path
) -> None:
    def key(**options: Any) -> dict[str, Any]:
        data = make(**({"teacher_tokenizer": "wordpiece:100"} | options))
        data.prepare()
        return data.teacher_key

    base = key()
    assert set(base) == {"sentences", "examples", "tokens", "tokenizer", "max_length", "truncation"}
    assert (base["examples"], base["max_length"], base["truncation"]) == (3 * TRAIN + 2 + 36, 64, "right")
    relabelled = tmp_path / "relabelled.csv"
    relabelled.write_text(toy_csv().read_text().replace(",bad\n", ",a terrible film\n"))
    same: list[dict[str, Any]] = [
        {"tokenizer": "wordpiece:300"}, {"batch_size": 4, "eval_batch_size": 7}, {"seed": 9}, {"num_workers": 1},
        {"train_file": str(relabelled), "class_names": ["a terrible film", "fine", "good"]},
    ]  # fmt: skip
    assert all(key(**options) == base for options in same)
    changes: list[tuple[dict[str, Any], set[str]]] = [
        ({"teacher_tokenizer": "wordpiece:70"}, {"tokenizer"}),
        ({"max_length": 32}, {"max_length"}),
        ({"split_seed": 1}, {"sentences", "tokenizer"}),  # a vocabulary learned from other sentences
        ({"mask_probability": 0.3}, {"sentences"}),
        ({"view_sets": 2}, {"sentences", "examples"}),
        ({"transfer": []}, {"sentences", "examples"}),
    ]
    for options, names in changes:
        changed = key(**options)
        assert {name for name in base if base[name] != changed[name]} == names


def test_teacher_key_knows_which_end_is_cut(make: Callable[..., TextFiles], tmp_path: Path) -> None:
    data = make(max_length=6)
    data.prepare()
    keys, first = [], []
    for side in ("right", "left"):
        data.student_tokenizer.save_pretrained(tmp_path / side)
        settings = tmp_path / side / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncation_side": side}))
        data = make(tokenizer=str(tmp_path / side), max_length=6)
        data.prepare()
        keys.append(data.teacher_key)
        first.append((data.fingerprint, rows([next(iter(data.test_dataloader()))])))
    assert keys[0] | {"truncation": "left"} == keys[1] != keys[0]
    assert first[0][0] != first[1][0]
    assert first[0][1] != first[1][1]
