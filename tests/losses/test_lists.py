"""Losses on a query's documents, against loops over queries of uneven length."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from scipy.stats import entropy

from kd_lightning.losses.list_labels import ListLabelsLoss, list_labels
from kd_lightning.losses.lists import Lists
from kd_lightning.losses.listwise_kl import ListwiseKLLoss, listwise_kl
from kd_lightning.losses.margin_mse_scores import MarginMSEScoresLoss
from kd_lightning.losses.ranknet import RankNetLoss, ranknet
from kd_lightning.types import Batch, ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

MASK = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
CASES = [
    Case("listwise_kl", listwise_kl, (randn(4, 5, seed=1), randn(4, 5, seed=2)), {"temperature": 2.0}, mask=MASK),
    Case("ranknet", ranknet, (randn(4, 5, seed=1), randn(4, 5, seed=2)), {"temperature": 2.0}, mask=MASK),
]
QUERIES = {7: [2.0, 0.0, 1.0, 0.0], 3: [1.0], 5: [0.0, 0.0], 9: [1.0, 0.0]}
"""The grades of four queries' documents: several relevant ones, a document alone, none that is relevant, one."""
ROWS = [(group, grade) for group, grades in QUERIES.items() for grade in grades]
ORDER = [4, 0, 7, 1, 5, 2, 8, 6, 3]
"""Documents of several queries between each other, those of each in their order."""
STUDENT, TEACHER = randn(9, 1, seed=3), randn(9, 1, seed=4, scale=3)
TERMS = [ListLabelsLoss(), ListwiseKLLoss(2.0), RankNetLoss(2.0), MarginMSEScoresLoss()]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def batch(rows: list[tuple[int, float]] = ROWS) -> Batch:
    groups, grades = zip(*rows, strict=True)
    return {"group": torch.tensor(groups), "labels": torch.tensor(grades), "index": torch.arange(len(rows))}


def by_loops() -> dict[str, float]:
    """Each loss as a mean over what counts of each query."""
    found: dict[str, list[float]] = {type(term).__name__: [] for term in TERMS}
    start = 0
    for grades in QUERIES.values():
        g, stop = np.array(grades), start + len(grades)
        s, t = (side.numpy()[start:stop, 0] for side in (STUDENT, TEACHER))
        start = stop
        if len(g) < 2:
            continue
        if g.sum():
            found["ListLabelsLoss"].append(-(g / g.sum() * log_softmax(s)).sum())
        found["ListwiseKLLoss"].append(4 * entropy(softmax(t / 2), softmax(s / 2)))
        pairs = [(expit((t[i] - t[j]) / 2), expit((s[i] - s[j]) / 2)) for i, j in combinations(range(len(g)), 2)]
        found["RankNetLoss"].append(4 * np.mean([entropy([p, 1 - p], [q, 1 - q]) for p, q in pairs]))
        for i in np.flatnonzero(g > 0):
            lower = np.flatnonzero(g < g[i])
            found["MarginMSEScoresLoss"].append(np.mean([((s[i] - s[j]) - (t[i] - t[j])) ** 2 for j in lower]))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_values_by_loops_in_any_order(term: Any) -> None:
    expected = by_loops()[type(term).__name__]
    assert term(ModelOutput(STUDENT), ModelOutput(TEACHER), batch()).item() == pytest.approx(expected)
    mixed = {name: value[ORDER] for name, value in batch().items()}
    value = term(ModelOutput(STUDENT[ORDER]), ModelOutput(TEACHER[ORDER]), mixed)
    assert value.item() == pytest.approx(expected)


def test_what_counts() -> None:
    assert [int(term.counts(batch())) for term in TERMS] == [2, 3, 3, 3]


def test_documents_keep_their_order() -> None:
    lists = Lists.of({name: value[ORDER] for name, value in batch().items()})
    assert lists.mask.sum(1).tolist() == [1, 2, 4, 2]  # by the queries' numbers: 3, 5, 7, 9
    assert lists.matrix(torch.tensor(ORDER)).tolist() == [[4, 0, 0, 0], [5, 6, 0, 0], [0, 1, 2, 3], [7, 8, 0, 0]]


@pytest.mark.parametrize("term", TERMS[1:], ids=lambda term: type(term).__name__)
def test_scores_may_differ_by_a_number_for_each_query(term: Any) -> None:
    shift = randn(10, 1, seed=5)[batch()["group"]]
    assert term(ModelOutput(TEACHER + shift), ModelOutput(TEACHER), batch()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_a_document_alone_is_a_zero_with_a_graph(term: Any) -> None:
    student = torch.full((2, 1), torch.nan, requires_grad=True)
    alone = batch([(0, 1.0), (1, 1.0)])
    value = term(ModelOutput(student), ModelOutput(student), alone)
    value.backward()
    assert (value.item(), term.counts(alone).item()) == (0, 0)
    assert student.grad is not None
    assert student.grad.abs().sum() == 0


def test_relevant_documents_beyond_the_best_are_learned_too() -> None:
    """The loss from grades is least where the softmax of scores is the share of grades."""
    grades = torch.tensor([[3.0, 1.0, 0.0]])
    best = torch.tensor([[3.0, 1.0, 1e-30]]).log()
    assert list_labels(best, grades) == pytest.approx(entropy([3, 1]), rel=1e-5)


def test_other_batches_and_networks_are_refused() -> None:
    output = ModelOutput(STUDENT)
    with pytest.raises(ValueError, match="no grades of a query's documents: this loss is for ranking"):
        ListwiseKLLoss()(output, output, {"labels": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"scores \(9, 3\): expected one for each of 9"):
        RankNetLoss()(ModelOutput(randn(9, 3)), output, batch())
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        ListwiseKLLoss(0.0)(output, output, batch())
    with pytest.raises(ValueError, match=r"student scores \(1, 2\) and teacher scores \(1, 3\)"):
        ranknet(torch.zeros(1, 2), torch.zeros(1, 3))
