"""Losses on pairs and triplets, against loops over what counts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.contrastive import ContrastiveLoss, contrastive
from kd_lightning.losses.cosine_scores import CosineScoreLoss, cosine_scores
from kd_lightning.losses.margin_mse import MarginMSELoss, margin_mse
from kd_lightning.losses.pair_labels import PairLabelsLoss
from kd_lightning.losses.pairs import Pairs
from kd_lightning.types import Batch, ModelOutput
from tests.losses.conformance import randn
from tests.tasks.test_sentence_embedding import rows

GROUPS = [[0, 1], [2, 3, 4], [0, 5], [6], [7, 1], [3, 8]]
"""A pair, a triplet, another pair of the first's query, a text alone, a positive twice, a query that is a positive."""
NEGATIVES = {(0, 1): {3, 4, 8}, (2, 3): {1, 4, 5, 8}, (0, 5): {3, 4, 8}, (7, 1): {3, 4, 5, 8}, (3, 8): {1, 4, 5}}
"""Of each pair the texts that are its negatives."""
STUDENT, TEACHER = randn(12, 5, seed=1), randn(12, 7, seed=2)


def texts_of(pairs: Pairs, batch: Batch) -> dict[tuple[int, int], set[int]]:
    text = batch["text"]
    return {
        (int(text[query]), int(text[pairs.documents[positive]])): set(text[pairs.documents[others]].tolist())
        for query, positive, others in zip(pairs.queries, pairs.positive, pairs.others, strict=True)
    }


def test_negatives_are_neither_positives_of_the_query_nor_equal_to_them() -> None:
    batch = rows(GROUPS)
    assert texts_of(Pairs.of(batch), batch) == NEGATIVES
    assert ContrastiveLoss().counts(batch).tolist() == [5]
    assert not len(Pairs.of(batch, scored=True).queries)


def by_loops(embeddings: Tensor, batch: Batch) -> dict[tuple[int, int], tuple[Tensor, list[Tensor]]]:
    """Each pair's cosine, and those with its negatives; a text that is there twice counts twice."""
    text, group, place = (batch[name].tolist() for name in ("text", "group", "place"))
    found = {}
    for i, p in enumerate(place):
        if p != 1:
            continue
        query = next(j for j in range(len(text)) if group[j] == group[i] and place[j] == 0)
        wrong = [j for j in range(len(text)) if place[j] and text[j] in NEGATIVES[text[query], text[i]]]
        cosine = partial(F.cosine_similarity, embeddings[query], dim=0)
        found[text[query], text[i]] = cosine(embeddings[i]), [cosine(embeddings[j]) for j in wrong]
    return found


def test_contrastive_by_loops() -> None:
    batch, term = rows(GROUPS), ContrastiveLoss(temperature=0.1)
    expected = [
        -torch.stack([right, *wrong]).div(0.1).log_softmax(0)[0] for right, wrong in by_loops(STUDENT, batch).values()
    ]
    value = term(ModelOutput(STUDENT), ModelOutput(STUDENT), batch)
    torch.testing.assert_close(value, torch.stack(expected).mean())


def test_margins_by_loops() -> None:
    batch = rows(GROUPS)
    student, teacher = by_loops(STUDENT, batch), by_loops(TEACHER, batch)
    expected = []
    for pair, (right, wrong) in student.items():
        own = right - torch.stack(wrong)
        theirs = teacher[pair][0] - torch.stack(teacher[pair][1])
        expected.append((own - theirs).square().mean())
    value = MarginMSELoss()(ModelOutput(STUDENT), ModelOutput(TEACHER), batch)
    torch.testing.assert_close(value, torch.stack(expected).mean())
    assert MarginMSELoss()(ModelOutput(3 * TEACHER), ModelOutput(TEACHER), batch).item() == pytest.approx(0, abs=1e-12)


def test_scored_pairs_by_hand() -> None:
    batch = rows([[0, 1], [2, 3], [4]], [1.0, 0.25, math.nan])
    cosines = F.cosine_similarity(STUDENT[[0, 2]], STUDENT[[1, 3]])
    expected = (cosines - torch.tensor([1.0, 0.25])).square().mean()
    value = CosineScoreLoss()(ModelOutput(STUDENT[:5]), ModelOutput(STUDENT[:5]), batch)
    torch.testing.assert_close(value, expected)
    assert ContrastiveLoss()(ModelOutput(STUDENT[:5]), ModelOutput(STUDENT[:5]), batch).item() == 0


@pytest.mark.parametrize("score", [None, [1.0, 0.25, 0.5, math.nan, 0.0, 1.0]])
def test_pairs_of_either_kind_teach(score: list[float] | None) -> None:
    batch, output = rows(GROUPS, score), ModelOutput(STUDENT)
    term, kinds = PairLabelsLoss(temperature=0.1, widths=[2]), [ContrastiveLoss(0.1, [2]), CosineScoreLoss([2])]
    expected = [kind(output, output, batch) for kind in kinds]
    assert [float(value) > 0 for value in expected] == [score is None, score is not None]
    torch.testing.assert_close(term(output, output, batch), sum(expected))
    assert term.counts(batch).tolist() == ([5, 0] if score is None else [0, 5])


@pytest.mark.parametrize("term", [ContrastiveLoss(), MarginMSELoss(), CosineScoreLoss(), PairLabelsLoss()])
def test_without_pairs_it_is_zero_with_a_graph(term: Any) -> None:
    student = torch.full((3, 4), torch.nan, requires_grad=True)
    value = term(ModelOutput(student), ModelOutput(student), rows([[0], [1], [2]]))
    assert value.item() == 0
    value.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", [ContrastiveLoss, MarginMSELoss])
def test_widths_are_averaged(kind: Any) -> None:
    batch, teacher = rows(GROUPS), ModelOutput(TEACHER)
    whole, cut = (kind()(ModelOutput(x), teacher, batch) for x in (STUDENT, STUDENT[:, :2]))
    torch.testing.assert_close(kind(widths=[2])(ModelOutput(STUDENT), teacher, batch), (whole + cut) / 2)


def test_a_batch_of_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch has no group, place, text, score: this loss is for pairs of texts"):
        MarginMSELoss()(ModelOutput(STUDENT), ModelOutput(TEACHER), {"labels": torch.zeros(12)})
    with pytest.raises(ValueError, match="temperature must be a positive number, got -1"):
        ContrastiveLoss(temperature=-1)
    with pytest.raises(ValueError, match=r"student scores \(1, 2\) and teacher scores \(1, 3\)"):
        margin_mse(torch.zeros(1, 2), torch.zeros(1, 3), torch.tensor([0]), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must have the same shape"):
        cosine_scores(torch.zeros(2), torch.zeros(3))


def test_a_student_far_off_has_a_finite_gradient() -> None:
    near = torch.tensor([[-1.0, 1.0, 1.0]], requires_grad=True)
    value = contrastive(near, torch.tensor([0]), torch.tensor([[False, True, False]]), 0.01)
    value.backward()
    assert value.item() == pytest.approx(200, rel=1e-5)
    assert near.grad is not None
    assert near.grad.tolist() == [pytest.approx([-100, 100, 0], rel=1e-4)]


def test_margins_have_the_gradient_of_the_student_alone() -> None:
    positive, others = torch.tensor([0, 1, 2]), ~torch.eye(3, 4, dtype=torch.bool)
    student, teacher = (randn(3, 4, seed=seed).requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda x: margin_mse(x, teacher.detach(), positive, others), (student,))
    margin_mse(student, teacher, positive, others).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert margin_mse(student[:1, :1], teacher[:1, :1], positive[:1], others[:1, :1]).item() == 0  # no negative
