"""The next token: shifted once, scored token by token, whatever the batches; against NumPy's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from kd_lightning.losses.soft_target import SoftTargetLoss
from kd_lightning.losses.sparse import sparse_kd
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.tasks import CausalLanguageModeling, task_of
from kd_lightning.tasks.evaluation import evaluate_all
from kd_lightning.types import IGNORE, Batch, ModelOutput, SparseLogits

V = 12
TASK = CausalLanguageModeling(V)


@pytest.fixture
def batch() -> Batch:
    """Three rows: two documents in one, one that ends with the padding's token, one short."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, V, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
    ids[mask == 0] = 0
    ids[1, 4] = 0  # a text's end
    labels = torch.where(mask.bool(), ids, IGNORE)
    labels[:, 0] = IGNORE
    labels[0, 3] = IGNORE  # a second document's first token
    width = torch.randint(1, 5, (3, 7), generator=generator) * mask
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "token_bytes": width, "index": torch.arange(3),
    }  # fmt: skip


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 7, V, generator=generator), torch.randn(3, 7, V, generator=generator)


def by_hand(logits: Tensor, batch: Batch) -> dict[str, float]:
    """Go through the places one by one."""
    surprises, right, size = [], [], 0
    for row in range(3):
        for place in range(6):
            label = int(batch["labels"][row, place + 1])
            if label == IGNORE:
                continue
            own = log_softmax(logits[row, place].double().numpy())
            surprises.append(-own[label])
            right.append(own.argmax() == label)
            size += int(batch["token_bytes"][row, place + 1])
    mean = float(np.mean(surprises))
    return {
        "cross_entropy": mean, "perplexity": math.exp(mean), "accuracy": float(np.mean(right)),
        "bits_per_byte": sum(surprises) / math.log(2) / size,
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [[3], [1, 2], [1, 1, 1]])
def test_scores_are_those_of_each_token_whatever_the_batches(
    batch: Batch, logits: tuple[Tensor, Tensor], sizes: list[int]
) -> None:
    scores = TASK.scores()
    for part in torch.arange(3).split(sizes):
        rows = TASK.compared({name: entry[part] for name, entry in batch.items()})
        scores.update(logits[0][part], rows["labels"], rows)
    found = {name: float(value) for name, value in scores.compute().items()}
    assert found == pytest.approx(by_hand(logits[0], batch), rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_of_the_likeliest_tokens_the_scores_are_exact_or_nan(
    batch: Batch, logits: tuple[Tensor, Tensor], k: int
) -> None:
    scores, rows, sparse = TASK.scores(), TASK.compared(batch), SparseLogits.of(logits[0], k)
    values = scores.update(sparse, rows["labels"], rows)
    found, expected = {name: float(value) for name, value in scores.compute().items()}, by_hand(logits[0], batch)
    among = (sparse.ids == rows["labels"][..., None]).any(-1)[rows["keep"]]
    surprise = values.of["cross_entropy"][0]
    assert torch.equal(surprise.isnan(), ~among)
    right = -logits[0].log_softmax(-1)[rows["keep"]].gather(-1, rows["labels"][rows["keep"]][:, None])[:, 0]
    torch.testing.assert_close(surprise[among], right[among])
    if not among.all():
        expected |= dict.fromkeys(("cross_entropy", "perplexity", "bits_per_byte"), math.nan)
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert bool(among.all()) == (k == V), "else nothing was left out"


def test_what_it_says_of_the_teacher_is_a_mean_over_tokens(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    fidelity, rows = TASK.fidelity(), TASK.compared(batch)
    fidelity.update(*logits, rows)
    found = {name: float(value) for name, value in fidelity.compute().items()}
    own, others = (log_softmax(x.double().numpy(), -1)[rows["keep"].numpy()] for x in logits)
    assert found["kl_to_teacher"] == pytest.approx((np.exp(others) * (others - own)).sum(-1).mean(), rel=1e-5)
    assert found["agreement"] == pytest.approx((own.argmax(-1) == others.argmax(-1)).mean())
    value = SoftTargetLoss()(ModelOutput(logits[0]), ModelOutput(logits[1]), rows)
    assert found["kl_to_teacher"] == pytest.approx(float(value), rel=1e-5)  # the training's scale


@pytest.mark.parametrize("k", [1, 5, V])
def test_a_sparse_teacher_is_compared_over_what_is_kept(batch: Batch, logits: tuple[Tensor, Tensor], k: int) -> None:
    rows, sparse = TASK.compared(batch), SparseLogits.of(logits[1], k)
    found = {}
    for name, against in (("sparse", sparse), ("dense", logits[1])):
        fidelity = TASK.fidelity()
        fidelity.update(logits[0], against, rows)
        found[name] = {key: float(value) for key, value in fidelity.compute().items()}
    expected = float(sparse_kd(logits[0], sparse, mask=rows["keep"]))
    assert found["sparse"]["kl_to_teacher"] == pytest.approx(expected, rel=1e-5)
    assert found["sparse"]["agreement"] == found["dense"]["agreement"]
    assert found["sparse"]["kl_to_teacher"] <= found["dense"]["kl_to_teacher"] * (1 + 1e-5)
    logits[0][0, 1, 3] = torch.nan
    fidelity.update(logits[0], sparse, rows)
    assert all(math.isnan(value) for value in fidelity.compute().values())


@pytest.mark.parametrize("sizes", [[3], [1, 2]])
def test_scores_and_their_errors_are_by_document_whatever_the_batches(
    batch: Batch, logits: tuple[Tensor, Tensor], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document may go on in another row; logits are computed with a few at a time."""
    monkeypatch.setattr("kd_lightning.tasks.token_scores.MOST_LOGITS", 5 * V)
    document = torch.tensor([[4, 4, 4, 7, 7, 7, 7], [7] * 5 + [-1] * 2, [2] * 2 + [-1] * 5])
    place = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0], [15, 16, 0, 0, 0, 0, 0]])
    batch |= {"document_ids": document, "position_ids": place}
    parts = [{name: entry[part] for name, entry in batch.items()} for part in torch.arange(3).split(sizes)]
    own, others = ({"student": 0, "teacher": 1}[name] for name in ("student", "teacher"))
    models = {
        name: lambda given, which=which: ModelOutput(logits[which][given["index"]])
        for name, which in (("student", own), ("teacher", others))
    }
    found = evaluate_all(TASK, models, parts, reference="teacher")["student"]  # type: ignore[arg-type]
    surprises: dict[int, list[float]] = {}
    near: dict[str, list[float]] = {"1-16": [], "17-64": []}
    among = []
    rows = TASK.compared(batch)
    for row, column in rows["keep"].nonzero().tolist():
        p, q = (log_softmax(one[row, column].double().numpy()) for one in logits)
        surprises.setdefault(int(document[row, column]), []).append(-p[int(rows["labels"][row, column])])
        divergence = float((np.exp(q) * (q - p)).sum())
        near["1-16" if place[row, column] < 16 else "17-64"].append(divergence)
        among.append(q.argmax() in np.argsort(p)[-5:])
    assert sorted(surprises) == [2, 4, 7]
    sums = found.units["cross_entropy"]
    assert sums.totals.tolist() == pytest.approx([sum(surprises[number]) for number in (2, 4, 7)], rel=1e-5)
    assert sums.weights.tolist() == [len(surprises[number]) for number in (2, 4, 7)]
    assert found.scores["agreement_top5"] == pytest.approx(np.mean(among))
    assert found.scores["kl_to_teacher/1-16"] == pytest.approx(np.mean(near["1-16"]), rel=1e-5)
    assert "kl_to_teacher/17-64" not in found.scores  # nothing is predicted there
    assert found.scores["kl_to_teacher"] == pytest.approx(np.mean(near["1-16"]), rel=1e-5)
    for name, score in by_hand(logits[0], batch).items():
        assert found.scores[name] == pytest.approx(score, rel=1e-5)
    assert found.scores.keys() <= TASK.specs.keys()


def test_the_best_constant_prediction_is_that_of_the_frequencies() -> None:
    labels = torch.tensor([3, 3, 3, 8])
    assert TASK.chance_score(labels) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_the_loss_is_that_of_the_scores(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    rows, output = TASK.compared(batch), ModelOutput(logits[0])
    assert float(TASK.loss()(output, output, rows)) == pytest.approx(
        by_hand(logits[0], batch)["cross_entropy"], rel=1e-5
    )


def test_what_stands_where_nothing_is_predicted_does_not_matter(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    rows, scores = TASK.compared(batch), TASK.scores()
    holed = torch.where(rows["keep"][..., None], logits[0], torch.nan)
    scores.update(holed, rows["labels"], rows)
    assert float(scores.compute()["cross_entropy"]) == pytest.approx(
        by_hand(logits[0], batch)["cross_entropy"], rel=1e-5
    )


def test_nan_is_never_a_score(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    rows, scores = TASK.compared(batch), TASK.scores()
    logits[0][0, 1, 3] = torch.nan
    scores.update(logits[0], rows["labels"], rows)
    assert all(math.isnan(value) for value in scores.compute().values())


def test_without_bytes_there_are_no_bits_per_byte(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    del batch["token_bytes"]
    rows, scores = TASK.compared(batch), TASK.scores()
    scores.update(logits[0], rows["labels"], rows)
    found = scores.compute()
    assert math.isnan(found["bits_per_byte"])
    assert not math.isnan(found["perplexity"])


def test_logits_of_another_shape_are_refused(batch: Batch) -> None:
    TASK.check_logits(torch.zeros(3, 7, V), batch)
    TASK.check_logits(torch.zeros(3, 7, 0), batch)  # of a network that leaves its output layer to the loss
    for wrong in (torch.zeros(3, V), torch.zeros(3, 7, V + 1), torch.zeros(3, 6, V)):
        with pytest.raises(ConfigError, match=r"a language model of these data \[3, 7, 12\]"):
            TASK.check_logits(wrong, batch)


def test_it_is_built_again_from_its_description() -> None:
    again = task_of(TASK.description)
    assert isinstance(again, CausalLanguageModeling)
    assert again.outputs == V


def test_it_reads_the_likeliest_next_tokens(batch: Batch, logits: tuple[Tensor, Tensor]) -> None:
    records = TASK.read(logits[0], batch, [])
    assert [record["tokens"][0] for record in records] == [
        int(logits[0][row, last].argmax()) for row, last in enumerate((6, 4, 1))
    ]
    assert TASK.cells(records[0])["token"] == str(records[0]["tokens"][0])
    logits[0][1, 4] = torch.nan
    with pytest.raises(KDError, match="NaN"):
        TASK.read(logits[0], batch, [])
