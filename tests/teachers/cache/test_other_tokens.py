"""Outputs of a teacher with another tokenizer: stored for its own tokens, and compared as those of the running one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd_lightning.data import ChatData, LMTextData
from kd_lightning.losses.cross_tokenizer import CrossTokenizerLoss
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.teachers.cache.fill import attention_mask, fill, stored_rows
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.teachers.cached import StoredForm
from kd_lightning.types import NEXT_LOG_PROB, Batch, ModelOutput
from tests.data.corpus.test_alignment import corpus
from tests.data.corpus.test_chat import talks, tokenizer
from tests.data.corpus.test_chat_alignment import crossed

__all__ = ["tokenizer"]  # a fixture

NEXT = (NEXT_LOG_PROB,)


@pytest.fixture(params=["documents", "concat", "none", "chat"])
def data(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Path) -> LMTextData | ChatData:
    if request.param == "chat":
        return crossed(tmp_path, tokenizer, talks(16), batch_size=3)
    return corpus(tmp_path, packing=request.param, student_bos=request.param == "none")


def network(data: LMTextData | ChatData) -> FrozenTeacher:
    sizes = data.model_arguments("teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = causal_lm_small(sizes["vocab_size"], 256, hidden_size=16, num_layers=1, num_heads=2)
        for weight in made.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return FrozenTeacher(made, features=NEXT)


def student(batch: Batch, classes: int) -> ModelOutput:
    generator = torch.Generator().manual_seed(int(batch["index"].sum()))
    return ModelOutput(2 * torch.randn(*batch["input_ids"].shape, classes, generator=generator))


def by_span(batch: Batch) -> list[Batch]:
    """Return the batch for every sixth of its spans, with that one alone."""
    places = (batch["spans"][..., 1] > 0).nonzero()[::6].tolist()
    found = []
    for row, place in places:
        spans = torch.zeros_like(batch["spans"][:, :1])
        spans[row, 0] = batch["spans"][row, place]
        found.append({**batch, "spans": spans})
    return found


@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [(Storage("float32", 8), 2e-5), (Storage("float16", 8), 2e-3), (Storage("float32"), 2e-5)], ids=str,
)  # fmt: skip
def test_from_the_cache_each_spans_loss_is_that_beside_the_running_teacher(
    data: LMTextData | ChatData, storage: Storage, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled in a pass over its own tokens, whose batches are others than those of the training."""
    monkeypatch.setattr("kd_lightning.teachers.cache.outputs.MOST_DENSE", 64)
    data.prepare()
    teacher, classes = network(data), data.task.outputs
    cache = TeacherCache.create(tmp_path / "outputs", {"of": "a test"}, data.num_examples, storage)
    passes = data.select(tokens="teacher").with_batches(eval_batch_size=5).all_dataloader()
    fill(cache, teacher, passes, lengths=torch.from_numpy(data.lengths), say=lambda line: None)
    assert cache.complete
    cached, live, term = CachedTeacher(cache, features=NEXT), StoredForm(teacher, storage), CrossTokenizerLoss()
    count = 0
    for batch in data.select(tokens="both").train_dataloader():
        one, other, own = cached(batch), live(batch), student(batch, classes)
        assert (one.sparse is None) == (storage.top_k is None)
        for span in by_span(batch):
            torch.testing.assert_close(term(own, one, span), term(own, other, span), rtol=tolerance, atol=tolerance)
            count += 1
    assert count > 10


def test_what_is_stored_as_the_training_meets_it_is_the_same(
    data: LMTextData | ChatData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation's prompts have no logits there."""
    monkeypatch.setattr("kd_lightning.teachers.cache.outputs.MOST_DENSE", 64)
    data.prepare()
    teacher, storage, term = network(data), Storage("float32", 8), CrossTokenizerLoss()
    cache = TeacherCache.create(tmp_path / "outputs", {"of": "a test"}, data.num_examples, storage)
    training = data.select(tokens="both")
    filling = CachedTeacher(cache, teacher)
    first = {int(batch["index"][0]): (batch, filling(batch)) for batch in training.train_dataloader()}
    for batch, found in first.values():
        again, own = CachedTeacher(cache)(batch), student(batch, data.task.outputs)
        torch.testing.assert_close(term(own, again, batch), term(own, found, batch), rtol=0, atol=0)
        rows, mask = stored_rows(batch), attention_mask(batch)
        assert mask is not None
        assert found.sparse is not None
        kept = mask.bool() if rows is None else rows
        assert (found.sparse.values.abs().sum(-1) > 0).equal(kept)
        assert found.sparse.rest.shape == batch["teacher_input_ids"].shape
        if isinstance(data, ChatData):
            assert 0 < kept.sum() < mask.sum() / 2


def test_a_network_without_logits_for_each_token_is_refused() -> None:
    teacher = FrozenTeacher(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), features=NEXT)
    with pytest.raises(ConfigError, match=r"next_log_prob needs all its logits for each token, and it gives \(2, 3\)"):
        teacher({"pixel_values": torch.ones(2, 1, 2, 2)})
