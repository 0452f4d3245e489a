"""Students that are narrower than their teacher: what they take, and that it fits together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from kd_lightning.models.adapt import run_network
from kd_lightning.models.from_teacher import from_teacher
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.models.narrow import important
from kd_lightning.models.rebuild import describe
from kd_lightning.runtime.errors import ConfigError
from tests.models.tiny import batch, tiny


def favouring(hidden: list[int], head: int, units: list[int], layer: int = 3) -> BertForSequenceClassification:
    """A teacher (8 wide, 2 heads of 4, 12 units) some of whose dimensions, heads and units have larger weights."""
    network = tiny("bert")
    assert isinstance(network, BertForSequenceClassification)
    one = network.bert.encoder.layer[layer]
    with torch.no_grad():
        network.bert.embeddings.word_embeddings.weight[:, hidden] *= 5
        for reads in (
            *(getattr(one.attention.self, name) for name in ("query", "key", "value")),
            one.intermediate.dense,
        ):
            reads.weight[:, hidden] *= 5
        for writes in (one.attention.output.dense, one.output.dense):
            writes.weight[hidden] *= 5
        one.attention.self.value.weight[4 * head : 4 * head + 4] *= 5
        one.attention.output.dense.weight[:, 4 * head : 4 * head + 4] *= 5
        one.intermediate.dense.weight[units] *= 5
    return network


def test_the_most_important_are_taken_and_fit_together() -> None:
    hidden, units = [1, 2, 5, 7], [0, 3, 4, 8, 9, 11]
    source = favouring(hidden, 1, units)
    student = from_teacher(source, 2, layers=[3], width=4)
    assert isinstance(student, BertForSequenceClassification)
    config = student.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (4, 1, 6)
    theirs, ours = source.bert, student.bert
    old, new = theirs.encoder.layer[3], ours.encoder.layer[0]
    rows = [4, 5, 6, 7]
    pairs = [
        (ours.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight[:, hidden]),
        (ours.embeddings.position_embeddings.weight, theirs.embeddings.position_embeddings.weight[:, hidden]),
        (ours.embeddings.LayerNorm.weight, theirs.embeddings.LayerNorm.weight[hidden]),
        (new.attention.self.query.weight, old.attention.self.query.weight[rows][:, hidden]),
        (new.attention.self.key.bias, old.attention.self.key.bias[rows]),
        (new.attention.output.dense.weight, old.attention.output.dense.weight[hidden][:, rows]),
        (new.attention.output.LayerNorm.bias, old.attention.output.LayerNorm.bias[hidden]),
        (new.intermediate.dense.weight, old.intermediate.dense.weight[units][:, hidden]),
        (new.intermediate.dense.bias, old.intermediate.dense.bias[units]),
        (new.output.dense.weight, old.output.dense.weight[hidden][:, units]),
        (new.output.dense.bias, old.output.dense.bias[hidden]),
        (ours.pooler.dense.weight, theirs.pooler.dense.weight[hidden][:, hidden]),
        (student.classifier.weight, source.classifier.weight[:, hidden]),
        (student.classifier.bias, source.classifier.bias),
    ]
    for mine, expected in pairs:
        assert torch.equal(mine, expected)
    run_network(student, batch()).logits.square().sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_all_of_it_is_the_teacher() -> None:
    source = tiny("bert")
    cut = important(source.state_dict(), source.get_input_embeddings().weight, source.config, source.config, [0, 3])
    for name, weight in source.state_dict().items():
        if "encoder.layer.1." not in name and "encoder.layer.2." not in name:
            assert torch.equal(cut(name, weight), weight), name


def pooled() -> nn.Module:
    return PooledClassifier(tiny("bert").base_model, 2, "max")


@pytest.mark.parametrize("rank", [None, 2])
def test_a_pooled_classifier_and_factorised_embeddings(rank: int | None) -> None:
    student = from_teacher(pooled(), 2, layers=2, width=4, embedding_rank=rank)
    assert isinstance(student, PooledClassifier)
    assert run_network(student, batch()).logits.shape == (2, 2)
    assert describe(student) is not None
    smaller = from_teacher(student, 3, layers=1, embedding_rank=rank)  # and it can be a teacher itself
    assert run_network(smaller, batch()).logits.shape == (2, 3)


def test_random_ones_have_the_same_shape() -> None:
    one, other = (from_teacher(pooled(), 2, width=4, initialise=how) for how in ("teacher", "random"))  # type: ignore[arg-type]
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (one, other)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("width", [0, 3, 8, 12])
def test_widths_that_are_refused(width: int) -> None:
    with pytest.raises(ConfigError, match=rf"width={width}: the teacher is 8 wide, in heads of 4"):
        from_teacher(tiny("bert"), 2, width=width)


@pytest.mark.parametrize("kind", ["roberta", "electra", "distilbert"])
def test_others_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"width=4: only a BERT can be made narrower, not {kind}"):
        from_teacher(tiny(kind), 2, width=4)
