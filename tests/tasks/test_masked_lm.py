"""Masked tokens: scored where they are masked, by document, whatever the batches; against scipy's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from kd_lightning.losses.soft_target import SoftTargetLoss
from kd_lightning.losses.sparse import SparseKDLoss
from kd_lightning.models.adapt import run_network
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks import MaskedLanguageModeling, task_of
from kd_lightning.tasks.evaluation import evaluate_all
from kd_lightning.types import IGNORE, Batch, ModelOutput, SparseLogits

V = 9
TASK = MaskedLanguageModeling(V)


@pytest.fixture
def batch() -> Batch:
    """Three texts of at most six tokens, of which 3, 1 and 2 are masked; two are of one document."""
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[1, 2, 4], [3, 0, 0], [0, 5, 0]])
    keep = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    labels = torch.randint(0, V, (3, 3), generator=generator).masked_fill(~keep, IGNORE)
    return {
        "input_ids": torch.randint(0, V, (3, 6), generator=generator), "attention_mask": torch.ones(3, 6).long(),
        "masked_places": places, "keep": keep, "labels": labels,
        "of_document": torch.tensor([[7, 7, 7], [4, -1, -1], [7, 7, -1]]), "index": torch.arange(3),
    }  # fmt: skip


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Of student and teacher, at the masked places."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, V, generator=generator), torch.randn(3, 3, V, generator=generator)


@pytest.mark.parametrize("sizes", [[3], [1, 2], [1, 1, 1]])
def test_scores_and_their_errors_are_by_document_whatever_the_batches(
    batch: Batch, logits: tuple[Tensor, Tensor], sizes: list[int]
) -> None:
    parts = [{name: entry[part] for name, entry in batch.items()} for part in torch.arange(3).split(sizes)]
    models = {
        name: lambda given, own=own: ModelOutput(own[given["index"]])
        for name, own in zip(("student", "teacher"), logits, strict=True)
    }
    found = evaluate_all(TASK, models, parts, reference="teacher")["student"]  # type: ignore[arg-type]
    own, theirs = (log_softmax(one.double().numpy(), -1) for one in logits)
    surprise, right, same, divergence = {4: [], 7: []}, [], [], []  # type: ignore[var-annotated]
    for row, column in batch["keep"].nonzero().tolist():
        p, q, label = own[row, column], theirs[row, column], int(batch["labels"][row, column])
        surprise[7 if row != 1 else 4].append(-p[label])
        right.append(p.argmax() == label)
        same.append(p.argmax() == q.argmax())
        divergence.append((np.exp(q) * (q - p)).sum())
    mean = np.mean(surprise[4] + surprise[7])
    assert found.scores["cross_entropy"] == pytest.approx(mean, rel=1e-5)
    assert found.scores["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.scores["accuracy"] == pytest.approx(np.mean(right))
    assert found.scores["agreement"] == pytest.approx(np.mean(same))
    assert found.scores["kl_to_teacher"] == pytest.approx(np.mean(divergence), rel=1e-5)
    assert found.scores.keys() == TASK.specs.keys()
    sums = found.units["cross_entropy"]
    assert sums.totals.tolist() == pytest.approx([sum(surprise[4]), sum(surprise[7])], rel=1e-5)
    assert sums.weights.tolist() == [1, 5]


def test_losses_are_those_of_the_scores(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = map(ModelOutput, logits)
    scores, fidelity = TASK.scores(), TASK.fidelity()
    scores.update(logits[0], batch["labels"], batch)
    fidelity.update(*logits, batch)
    rows = TASK.compared(batch)
    assert float(TASK.loss()(student, teacher, rows)) == pytest.approx(float(scores.compute()["cross_entropy"]))
    assert TASK.loss().counts(rows).tolist() == [6]
    near = float(fidelity.compute()["kl_to_teacher"])
    assert float(SoftTargetLoss()(student, teacher, rows)) == pytest.approx(near, rel=1e-5)
    sparse = ModelOutput(logits[1][..., :0], sparse=SparseLogits.of(logits[1], 3))
    value = float(SparseKDLoss(3)(student, sparse, rows))
    assert 0 < value < near
    assert value == pytest.approx(float(SparseKDLoss(3)(student, teacher, rows)), rel=1e-6)


def test_what_stands_at_no_mask_does_not_matter(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    expected, found = TASK.scores(), TASK.scores()
    expected.update(logits[0], batch["labels"], batch)
    found.update(torch.where(batch["keep"][..., None], logits[0], torch.nan), batch["labels"], batch)
    assert found.compute() == expected.compute()
    nothing = {**batch, "keep": torch.zeros_like(batch["keep"])}
    loss = TASK.loss()(ModelOutput(logits[0].requires_grad_()), ModelOutput(logits[1]), nothing)
    assert loss.item() == 0
    loss.backward()


def test_of_any_network_the_rows_of_masked_tokens_are_returned(batch: Batch) -> None:
    """A network of one's own gives `(B, L, V)`; one that reads the places gives what it likes."""

    class Everywhere(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.arange(18.0).view(1, 6, 3).expand(len(input_ids), -1, -1)

    class Anything(torch.nn.Module):
        def forward(self, **batch: Tensor) -> Tensor:
            assert set(batch) == {"input_ids", "attention_mask"}
            return torch.arange(18.0).view(1, 6, 3).expand(3, -1, -1)

    for network in (Everywhere(), Anything()):
        found = run_network(network, batch).logits
        assert found[..., 0].tolist() == (3 * batch["masked_places"]).tolist()
        with pytest.raises(
            ConfigError, match=r"shape \[3, 3, 3\] at the masked tokens, and these data need \[3, 3, 9\]"
        ):
            TASK.check_logits(found, batch)


def test_predictions_are_the_likeliest_tokens_at_each_mask() -> None:
    logits = torch.log(torch.tensor([[[0.1, 0.7, 0.2], [1 / 3, 1 / 3, 1 / 3]], [[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]]]))
    one, two = TASK.read(logits, {"keep": torch.tensor([[True, False], [True, True]])}, [])
    assert one["masks"][0]["tokens"] == [1, 2, 0]
    assert one["masks"][0]["probabilities"] == pytest.approx([0.7, 0.2, 0.1])
    assert [mask["tokens"][0] for mask in two["masks"]] == [0, 2]
    assert len(one["masks"]) == 1
    record = {"masks": [{"tokens": ["a", "b"], "probabilities": [0.75, 0.25]}]}
    assert TASK.cells(record) == {"mask 1": "a 0.750, b 0.250"}
    with pytest.raises(KDError, match="NaN"):
        TASK.read(logits * torch.nan, {"keep": torch.ones(2, 2).bool()}, [])


def test_a_task_is_made_again_of_its_description() -> None:
    again = task_of(TASK.description)
    assert isinstance(again, MaskedLanguageModeling)
    assert again.settings == TASK.settings
    assert again.chance_score(torch.tensor([3, 3, 3, 8])) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )
