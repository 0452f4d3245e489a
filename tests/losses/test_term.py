from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_lightning.losses.term import Averages, Term, at_least_float32, kept_rows, reduce
from kd_lightning.types import IGNORE, Batch, ModelOutput


class Zero(Term):
    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        return student.logits.sum() * 0


def test_reduce_over_everything() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert reduce(values, None, "mean").item() == 3.0
    assert reduce(values, None, "sum").item() == 9.0
    assert reduce(values, None, "none") is values


def test_reduce_over_what_counts() -> None:
    values, mask = torch.tensor([1.0, float("nan"), 6.0]), torch.tensor([True, False, True])
    assert reduce(values, mask, "mean").item() == 3.5
    assert reduce(values, mask, "sum").item() == 7.0
    assert reduce(values, mask, "none").tolist() == [1.0, 0.0, 6.0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduce_over_nothing_is_a_zero_with_a_graph(reduction: str) -> None:
    values = torch.ones(3, requires_grad=True)
    value = reduce(values, torch.zeros(3, dtype=torch.bool), reduction)  # type: ignore[arg-type]
    value.backward()
    assert value.item() == 0.0
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0, 0.0]
    assert reduce(torch.zeros(0), None, reduction).item() == 0.0  # type: ignore[arg-type]


def test_only_half_precision_is_widened() -> None:
    wide = {dtype: at_least_float32(torch.ones(1, dtype=dtype)).dtype for dtype in (torch.float16, torch.bfloat16)}
    assert set(wide.values()) == {torch.float32}
    for dtype in (torch.float32, torch.float64):
        assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == dtype


def test_scheduled_values_follow_progress() -> None:
    term = Zero()
    assert term.now(4.0) == 4.0
    assert term.now(lambda progress: 1 + progress) == 1.0
    term.progress = 0.5
    assert term.now(lambda progress: 1 + progress) == 1.5
    assert Zero().progress == 0.0  # an instance's own, not its class's


def test_a_term_must_say_what_it_computes() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Term()  # type: ignore[abstract]


def test_every_example_of_class_logits_counts() -> None:
    assert kept_rows(torch.zeros(2, 3), {"labels": torch.full((2,), IGNORE)}) is None


def test_rows_of_tokens_count_as_the_batch_says() -> None:
    keep = torch.tensor([[True, False, True], [False, True, False]])
    assert kept_rows(torch.zeros(2, 3, 5), {"labels": torch.zeros(2, 3), "keep": keep}) is keep


@pytest.mark.parametrize(
    ("batch", "given"),
    [({"labels": torch.zeros(2, 3)}, "no `keep`"), ({"keep": torch.ones(2, 2).bool()}, r"`keep` \(2, 2\)")],
)
def test_token_logits_need_to_know_their_rows(batch: Batch, given: str) -> None:
    with pytest.raises(ValueError, match=rf"logits \(2, 3, 5\) have a row for each position.* {given} for which count"):
        kept_rows(torch.zeros(2, 3, 5), batch)


@pytest.mark.parametrize(("averages", "count"), [("logits", 3), ("labels", 2), ("examples", 2), ("tokens", 5)])
def test_what_a_mean_over_tokens_is_over(averages: Averages, count: int) -> None:
    labels = torch.tensor([[0, 1, IGNORE], [1, 0, 1]])
    keep, mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool(), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"labels": labels, "keep": keep, "attention_mask": mask}
    assert Zero().count(batch, averages).tolist() == [count]
