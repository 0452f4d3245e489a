from __future__ import annotations

import numpy as np
import pytest
import torch.distributed

from kd_lightning.data.sampler import BucketBatchSampler
from kd_lightning.runtime.errors import ConfigError

LENGTHS = np.random.default_rng(0).integers(3, 60, 1003)


def ranks(count: int, world: int, batch_size: int, epoch: int = 0, shuffle: bool = True) -> list[list[np.ndarray]]:
    samplers = [
        BucketBatchSampler(LENGTHS[:count], batch_size, shuffle=shuffle, seed=1, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert [len(b) for b in batches] == [len(sampler) for sampler in samplers]
    return batches


def test_every_example_once_on_one_process() -> None:
    (batches,) = ranks(1003, 1, 32)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert sorted(map(len, batches)) == [1003 % 32] + [32] * 31


def test_batches_hold_like_lengths() -> None:
    (batches,) = ranks(1003, 1, 32)
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    assert padded < 1.05 * LENGTHS.sum()
    random_batches = np.array_split(np.random.default_rng(0).permutation(1003), 32)
    assert sum(len(batch) * LENGTHS[batch].max() for batch in random_batches) > 1.5 * LENGTHS.sum()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, again, later = (ranks(1003, 1, 32, epoch=epoch)[0] for epoch in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, later, strict=True))
    other = BucketBatchSampler(LENGTHS, 32, shuffle=True, seed=2)
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_long_batches_do_not_come_last() -> None:
    (batches,) = ranks(1003, 1, 8)
    means = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [1003, 1000, 97, 13, 5])
def test_ranks_train_on_what_one_process_would(count: int, world: int) -> None:
    shared = ranks(count, world, 8, epoch=2)
    assert len({len(batches) for batches in shared}) == 1
    for step in zip(*shared, strict=True):
        assert len({len(batch) for batch in step}) == 1
    seen = np.concatenate([np.concatenate(batches) for batches in shared])
    assert set(seen) == set(range(count))
    assert len(seen) == count + -count % world
    if count % world == 0:
        (whole,) = ranks(count, 1, 8 * world, epoch=2)
        for step, batch in zip(zip(*shared, strict=True), whole, strict=True):
            assert set(np.concatenate(step)) == set(batch)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 7, 128])
@pytest.mark.parametrize("count", [1003, 97, 13, 5, 4])
def test_evaluation_takes_each_example_once(count: int, world: int, batch_size: int) -> None:
    shared = ranks(count, world, batch_size, shuffle=False)
    assert sorted(np.concatenate([np.concatenate(batches) for batches in shared])) == list(range(count))
    assert len({len(batches) for batches in shared}) == 1
    assert all(len(batch) > 0 for batches in shared for batch in batches)


def test_rank_and_world_are_those_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    sampler = BucketBatchSampler(LENGTHS, 8, shuffle=True, seed=1)
    assert sampler.global_batch_size == 16
    assert all(np.array_equal(a, b) for a, b in zip(sampler, ranks(1003, 2, 8)[1], strict=True))


def test_resuming_leaves_out_batches_of_one_epoch_only() -> None:
    sampler = BucketBatchSampler(LENGTHS, 32, shuffle=True, seed=1)
    sampler.resume(3, 10)
    rest, (whole,) = list(sampler), ranks(1003, 1, 32, epoch=3)
    assert len(sampler) == len(whole) == len(rest) + 10
    assert all(np.array_equal(a, b) for a, b in zip(rest, whole[10:], strict=True))
    sampler.set_epoch(4)
    assert len(list(sampler)) == len(whole)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_no_batch_is_a_single_example_where_that_can_be(world: int, batch_size: int) -> None:
    for count in (*range(world, 40), min(50 * batch_size * world + world, len(LENGTHS))):
        shared = ranks(count, world, batch_size)
        sizes = [len(batch) for batches in shared for batch in batches]
        seen = np.concatenate([np.concatenate(batches) for batches in shared])
        assert set(seen) == set(range(count))
        assert len(seen) == count + -count % world
        assert max(sizes) <= batch_size
        sampler = BucketBatchSampler(LENGTHS[:count], batch_size, shuffle=True, rank=0, world_size=world)
        assert sampler.smallest == min(sizes)
        assert min(sizes) > 1 or batch_size < 3 or count <= world or world > 1


@pytest.mark.parametrize("count", [32, 34, 40, 258])
def test_two_processes_train_on_the_batches_of_one_with_the_same_global_batch(count: int) -> None:
    (one,), two = ranks(count, 1, 16), ranks(count, 2, 8)
    together = [np.sort(np.concatenate(step)) for step in zip(*two, strict=True)]
    assert all(np.array_equal(np.sort(a), b) for a, b in zip(one, together, strict=True))


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size=0"):
        BucketBatchSampler(LENGTHS, 0, shuffle=True)
    with pytest.raises(ConfigError, match="3 examples cannot be divided among 4 processes"):
        BucketBatchSampler(LENGTHS[:3], 8, shuffle=False, rank=0, world_size=4)
