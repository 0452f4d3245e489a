"""Tokens that a teacher draws: which, with which weights, and from what they follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import FrozenTeacher, SampledTeacher
from kd_lightning.teachers.ahead import _Ahead
from kd_lightning.teachers.sampled import drawn, starts_of
from kd_lightning.types import Batch, ModelOutput, SparseLogits

V, K = 50, 6


def weights(sparse: SparseLogits) -> Tensor:
    """Each row's estimate of the distribution, `(N, V)`."""
    each = torch.maximum(sparse.values, sparse.rest[..., None]).exp()
    return torch.zeros(sparse.shape).scatter_add(-1, sparse.ids, each)


def logits_of(rows: int, scale: float) -> Tensor:
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, 8.0])
def test_over_seeds_the_weights_are_the_distribution_within_standard_errors(scale: float) -> None:
    logits, seeds = logits_of(1, scale), 4000
    starts = torch.rand(seeds, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = weights(drawn(logits.expand(seeds, V), K, starts))
    error = found.std(0) / seeds**0.5
    away = (found.mean(0) - logits.softmax(-1)[0]).abs()
    assert (away <= 4 * error + 1e-5).all()
    if scale:
        with_replacement = torch.multinomial(logits.softmax(-1)[0], K * seeds, replacement=True).view(seeds, K)
        counts = torch.zeros(seeds, V).scatter_add(1, with_replacement, torch.full((seeds, K), 1 / K))
        assert found.var(0).sum() < counts.var(0).sum()


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, 8.0, 60.0, 2000.0])
def test_each_row_has_k_tokens_whose_weights_sum_to_one(scale: float) -> None:
    logits = logits_of(200, scale)
    starts = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sparse = drawn(logits, K, starts)
    assert all(len(set(row)) == K for row in sparse.ids.tolist())
    torch.testing.assert_close(weights(sparse).sum(-1), torch.ones(200), rtol=1e-4, atol=1e-4)
    expected = logits.log_softmax(-1).gather(-1, sparse.ids).clamp(min=-1e4)
    torch.testing.assert_close(sparse.values, expected)
    assert sparse.rest.isfinite().all()


def test_the_extremes_of_a_start_draw_like_any_other() -> None:
    for start in (0.0, 1 - 2**-24):
        sparse = drawn(logits_of(50, 1.0), K, torch.full((50,), start, dtype=torch.float64))
        assert all(len(set(row)) == K for row in sparse.ids.tolist())


def test_a_nan_stays_one() -> None:
    logits = logits_of(3, 1.0)
    logits[1, 7] = torch.nan
    sparse = drawn(logits, K, torch.zeros(3, dtype=torch.float64))
    assert sparse.values.isnan().all(-1).tolist() == [False, True, False]
    assert ((sparse.ids >= 0) & (sparse.ids < V)).all()


def test_a_token_is_drawn_by_the_tokens_up_to_it_alone() -> None:
    ids, mask = torch.randint(0, 99, (4, 12), generator=torch.Generator().manual_seed(0)), torch.ones(4, 12)
    starts = starts_of(ids, mask)
    other = ids.clone()
    other[:, 8:] = 5
    assert torch.equal(starts_of(other)[:, :8], starts[:, :8])
    assert (starts_of(other)[:, 8:] != starts[:, 8:]).all()
    left = torch.cat([torch.full((4, 3), 7), ids], 1), torch.cat([torch.zeros(4, 3), mask], 1)
    assert torch.equal(starts_of(*left)[:, 3:], starts)
    many = starts_of(torch.randint(0, 99, (100, 100), generator=torch.Generator().manual_seed(2)))
    assert abs(many.mean().item() - 0.5) < 4 * (1 / 12 / 10_000) ** 0.5
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(torch.corrcoef(torch.stack([many[:, 1:].ravel(), many[:, :-1].ravel()]))[0, 1].item()) < 0.04


class Rows(nn.Module):
    """Logits that each token decides."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return (input_ids[..., None] * torch.arange(V) * 0.37).sin() * 4


def batch() -> Batch:
    return {"input_ids": torch.arange(8).view(2, 4), "index": torch.arange(2)}


def test_it_refuses_logits_that_are_not_of_tokens_or_too_few() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.cache_samples=4 draws of each token's classes.*\(2, 3\)"):
        SampledTeacher(FrozenTeacher(nn.Linear(4, 3)), 4)({"pixel_values": torch.ones(2, 4)})
    with pytest.raises(ConfigError, match=r"below their number of tokens"):
        SampledTeacher(FrozenTeacher(Rows()), V)(batch())


def test_a_batch_ahead_carries_them() -> None:
    teacher = SampledTeacher(FrozenTeacher(Rows()), K)
    (carried,) = _Ahead([batch()], teacher, torch.device("cpu"))
    from kd_lightning.teachers import AheadTeacher

    found, expected = AheadTeacher(teacher)(carried), teacher(batch())
    assert found.sparse is not None
    assert expected.sparse is not None
    assert torch.equal(found.sparse.ids, expected.sparse.ids)
    assert found.sparse.drawn
    assert isinstance(found, ModelOutput)
    assert found.logits.shape == (2, 4, 0)


def test_of_masked_tokens_each_draw_is_that_of_its_place() -> None:
    """The same as of all tokens, of which these rows are taken."""
    table = nn.Embedding(V, V)
    ids = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(2)}
    places = torch.tensor([[1, 4], [0, 6]])
    teacher = SampledTeacher(FrozenTeacher(table), K)
    whole, some = teacher(batch).sparse, teacher(batch | {"masked_places": places}).sparse
    assert whole is not None
    assert some is not None
    assert some.ids.shape == (2, 2, K)
    rows = torch.arange(2)[:, None]
    assert torch.equal(some.ids, whole.ids[rows, places])
    assert torch.equal(some.values, whole.values[rows, places])
