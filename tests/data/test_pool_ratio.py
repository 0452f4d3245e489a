"""How many views and transfer examples an epoch takes for each training example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_lightning.data import FashionMNIST, TextFiles
from kd_lightning.data.sampler import BucketBatchSampler, Share, endless
from kd_lightning.runtime.errors import ConfigError
from tests.data.images import write_fashion
from tests.data.text.test_views import TRAIN, epoch_of, fit, rows


@pytest.fixture
def make(toy_csv: Callable[..., Path], tmp_path: Path) -> Callable[..., TextFiles]:
    (tmp_path / "more.txt").write_text("".join(f"more of the same {i}\n" for i in range(100)))
    given = {"train_file": str(toy_csv()), "tokenizer": "wordpiece:200", "transfer": [str(tmp_path / "more.txt")]}
    return lambda **options: TextFiles(**(given | {"batch_size": 8, "seed": 3} | options))


def taken(data: TextFiles, epoch: int) -> list[int]:
    return [i for i, _ in rows(epoch_of(data, epoch))]


def test_an_endless_row_of_passes() -> None:
    found = [number * 7 + int(i) for epoch in range(4) for number, places in endless(7, 5, epoch, [3]) for i in places]
    assert len(found) == 20
    assert [sorted(i % 7 for i in found[start : start + 7]) for start in (0, 7)] == [list(range(7))] * 2
    assert sum(len(places) for _, places in endless(3, 10, 2, [3])) == 10


def test_all_of_the_pool_is_taken_before_any_comes_again(make: Callable[..., TextFiles]) -> None:
    data = make(pool_ratio=0.5)
    epochs = [taken(data, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(i for i in epoch if i < TRAIN) == list(range(TRAIN))
        assert len(epoch) == TRAIN + 42
    pool = [i for epoch in epochs for i in epoch if i >= TRAIN]
    assert len(set(pool[:84])) == 84
    assert set(pool) == set(range(TRAIN, TRAIN + 100))
    assert taken(make(pool_ratio=0.5), 1) == epochs[1] != taken(make(pool_ratio=0.5, seed=4), 1)


def test_more_than_there_are_come_again(make: Callable[..., TextFiles]) -> None:
    found = np.bincount([i for i in taken(make(pool_ratio=2), 0) if i >= TRAIN])[TRAIN:]
    assert found.sum() == 2 * TRAIN
    assert set(found) == {1, 2}


@pytest.mark.parametrize("sets", [3, None])
def test_with_views_that_take_turns(make: Callable[..., TextFiles], sets: int | None) -> None:
    data = make(views=2, view_sets=sets, pool_ratio=1.5)
    for epoch in range(4):
        found = taken(data, epoch)
        assert len(found) == TRAIN + 126
        if sets is not None:
            start = TRAIN + epoch % 3 * 2 * TRAIN
            known = {*range(TRAIN), *range(start, start + 2 * TRAIN), *range(7 * TRAIN, 7 * TRAIN + 100)}
            assert set(found) <= known
    assert sorted(taken(data.select(pool=False), 1)) == list(range(TRAIN))


def test_resumed_and_shared_by_ranks(make: Callable[..., TextFiles], tmp_path: Path) -> None:
    import lightning as L

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "some.ckpt")

    step = len(make(pool_ratio=0.5).train_dataloader()) + 4
    whole = fit(make(pool_ratio=0.5), [Save()])
    assert fit(make(pool_ratio=0.5), ckpt_path=tmp_path / "some.ckpt") == whole[step:]
    with pytest.raises(ConfigError, match="cannot resume: the data's fingerprint"):
        fit(make(), ckpt_path=tmp_path / "some.ckpt")
    alone = make(pool_ratio=0.5).train_dataloader()
    turn: Any = alone.dataset.turn  # type: ignore[attr-defined]
    ranks = [BucketBatchSampler(turn, 4, shuffle=True, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for sampler in (*ranks, alone.sampler):
        sampler.set_epoch(2)  # type: ignore[attr-defined]
    for together, *parts in zip(alone.sampler, *ranks, strict=True):
        assert sorted(np.concatenate(parts)) == sorted(together)  # type: ignore[arg-type]


def test_views_of_images(tmp_path: Path) -> None:
    options = {"folder": str(write_fashion(tmp_path / "images", train=100)), "views": 3, "batch_size": 10}
    data = FashionMNIST(**options, pool_ratio=1)  # type: ignore[arg-type]
    data.prepare()
    train = data.sizes["train"]
    turns = [data._training_dataset().turn(epoch)[0] for epoch in range(3)]
    assert all(sorted(turn)[:train] == list(range(train)) and len(turn) == 2 * train for turn in turns)
    assert len({int(i) for turn in turns for i in turn}) == 4 * train


def test_the_teachers_outputs_do_not_depend_on_it(make: Callable[..., TextFiles]) -> None:
    made = [make(pool_ratio=ratio) for ratio in (None, 0.5, 1)]
    for data in made:
        data.prepare()
    assert all(data.teacher_key == made[0].teacher_key for data in made)
    assert len({data.fingerprint for data in made}) == 3


def test_a_share_of_nothing_is_nothing() -> None:
    positions = np.arange(4)
    assert Share(4, 2.0, 0).of((positions, positions), 0)[0] is positions


@pytest.mark.parametrize("ratio", [0, -1, float("inf")])
def test_what_is_refused(make: Callable[..., TextFiles], ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.pool_ratio=\S+: expected a positive number"):
        make(pool_ratio=ratio)
    with pytest.raises(ConfigError, match=r"data\.pool_ratio=1: no views or transfer data"):
        make(pool_ratio=1, transfer=[]).prepare()
