"""Losses on embeddings: against numpy, at equality, with projectors and at Matryoshka widths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from kd_lightning.losses.embedding_cosine import EmbeddingCosineLoss, embedding_cosine
from kd_lightning.losses.embedding_mse import EmbeddingMSELoss, embedding_mse
from kd_lightning.losses.embedding_term import principal_directions
from kd_lightning.losses.similarity_kl import SimilarityKLLoss, similarity_kl
from kd_lightning.types import ModelOutput
from tests.losses.conformance import Case, Conformance, randn, title

STUDENT, TEACHER = randn(6, 4, seed=1), randn(6, 4, seed=2)
CASES = [
    Case("embedding_mse", embedding_mse, (STUDENT, TEACHER), {}),
    Case("embedding_cosine", embedding_cosine, (STUDENT, TEACHER), {}),
    # Not a mean: texts are related to one another, so half a batch has other relations than the whole.
    Case("similarity_kl", similarity_kl, (STUDENT, randn(6, 5, seed=2)), {"temperature": 0.2}, zero=False, mean=False),
]


@pytest.mark.parametrize("case", CASES, ids=title)
class TestConformance(Conformance):
    pass


def test_values_by_numpy() -> None:
    s, t = STUDENT.numpy(), TEACHER.numpy()
    assert embedding_mse(STUDENT, TEACHER).item() == pytest.approx(((s - t) ** 2).sum(1).mean())
    cosines = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    np.testing.assert_allclose(embedding_cosine(STUDENT, TEACHER, reduction="none"), 1 - cosines)
    logs = []
    for x in (s, t):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        near = unit @ unit.T / 0.1
        logs.append(log_softmax(np.array([np.delete(row, i) for i, row in enumerate(near)]), axis=1))
    expected = (np.exp(logs[1]) * (logs[1] - logs[0])).sum(1).mean()
    assert similarity_kl(STUDENT, TEACHER, 0.1).item() == pytest.approx(expected)


def test_of_length_1_the_distance_is_twice_one_less_the_cosine() -> None:
    s, t = (nn.functional.normalize(x, dim=1) for x in (STUDENT, TEACHER))
    torch.testing.assert_close(embedding_mse(s, t), 2 * embedding_cosine(s, t))


def test_similarities_know_no_rotation_scale_or_width() -> None:
    turn = torch.linalg.qr(randn(4, 4, seed=3))[0]
    wide = torch.cat([TEACHER @ turn * 3, torch.zeros(6, 2)], dim=1)
    assert similarity_kl(wide, TEACHER).item() == pytest.approx(0, abs=1e-9)
    assert similarity_kl(STUDENT[:1], TEACHER[:1]).item() == 0
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        similarity_kl(STUDENT, TEACHER, 0.0)
    with pytest.raises(ValueError, match="must be vectors"):
        similarity_kl(STUDENT[:3], TEACHER)


@pytest.mark.parametrize("function", [embedding_mse, embedding_cosine])
def test_shapes_that_differ(function: Any) -> None:
    with pytest.raises(ValueError, match=r"student embeddings \(2, 3\) and teacher embeddings \(2, 4\)"):
        function(torch.zeros(2, 3), torch.zeros(2, 4))


def output(x: Tensor) -> ModelOutput:
    return ModelOutput(x.float())


@pytest.mark.parametrize("kind", [EmbeddingMSELoss, EmbeddingCosineLoss])
def test_equal_widths_need_no_projector(kind: Any) -> None:
    term = kind()
    term.connect(output(STUDENT), output(TEACHER), 6)
    assert not list(term.parameters())
    function = embedding_mse if kind is EmbeddingMSELoss else embedding_cosine
    torch.testing.assert_close(term(output(STUDENT), output(TEACHER), {}), function(STUDENT.float(), TEACHER.float()))
    linear = kind(projector="linear")
    linear.connect(output(STUDENT), output(TEACHER), 6)
    assert len(list(linear.parameters())) == 2


def test_a_narrow_student_begins_at_the_principal_directions() -> None:
    """A student with the teacher's principal coordinates is as near as a vector of its width can be."""
    teacher = randn(50, 6, seed=4) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    values = torch.linalg.svdvals(teacher)
    student = teacher @ principal_directions(teacher, 2)
    term = EmbeddingMSELoss()
    term.connect(ModelOutput(student), ModelOutput(teacher), 50)
    term.double()
    value = term(ModelOutput(student), ModelOutput(teacher), {})
    assert value.item() == pytest.approx(float(values[2:].square().sum()) / 50)
    value.backward()
    assert all(weight.grad is not None for weight in term.parameters())


def test_principal_directions_of_few_texts_are_completed() -> None:
    found = principal_directions(randn(2, 5, seed=5), 4)
    torch.testing.assert_close(found.T @ found, torch.eye(4, dtype=torch.float64))
    assert principal_directions(randn(3, 2, seed=6), 4)[:, 2:].abs().max() == 0


def test_each_width_has_a_projector_and_they_are_averaged() -> None:
    term = EmbeddingMSELoss(widths=[2, 3])
    term.connect(output(STUDENT), output(TEACHER), 6)
    assert term.projectors is not None
    inputs = [STUDENT.float(), STUDENT[:, :2].float(), STUDENT[:, :3].float()]
    values = [embedding_mse(p(x), TEACHER.float()) for p, x in zip(term.projectors, inputs, strict=True)]
    torch.testing.assert_close(term(output(STUDENT), output(TEACHER), {}), torch.stack(values).mean())
    similar = SimilarityKLLoss(widths=[2])
    values = [similarity_kl(x, TEACHER.float()) for x in inputs[:2]]
    torch.testing.assert_close(similar(output(STUDENT), output(TEACHER), {}), torch.stack(values).mean())
    with pytest.raises(ValueError, match=r"widths=\[4\]: the embedding is 4 wide, not above 4"):
        EmbeddingMSELoss(widths=[4]).connect(output(STUDENT), output(TEACHER), 6)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="projector='mlp': expected one of pca, linear, none"):
        EmbeddingMSELoss(projector="mlp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the student's embedding is 3 wide and the teacher's 4, and projector=none"):
        EmbeddingMSELoss("none").connect(output(STUDENT[:, :3]), output(TEACHER), 6)
    with pytest.raises(ValueError, match=r"outputs \(2, 3, 4\) are no embeddings"):
        EmbeddingMSELoss().connect(output(torch.zeros(2, 3, 4)), output(TEACHER), 6)
    with pytest.raises(ValueError, match="the projectors are not built"):
        EmbeddingMSELoss()(output(STUDENT), output(TEACHER), {})
    assert math.isfinite(embedding_cosine(torch.zeros(1, 2), torch.ones(1, 2)))
