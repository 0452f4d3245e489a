from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
)

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.models.new_head import with_new_head
from kd_lightning.models.rebuild import describe, factorise_embedding, from_description
from kd_lightning.models.sentence_encoder import SentenceEncoder
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.runtime.errors import ConfigError

SHAPE: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "attn_implementation": "sdpa",
}  # fmt: skip
BATCH = {
    "input_ids": torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(3, 6, dtype=torch.long),
}


def config(**more: Any) -> BertConfig:
    return BertConfig(**SHAPE, **more)


TRAINED = {
    "sequence": lambda: BertForSequenceClassification(config(num_labels=4)),
    "tokens": lambda: BertForTokenClassification(config(num_labels=4)),
    "masked": lambda: BertForMaskedLM(config()),
    "pooled": lambda: PooledClassifier(BertModel(config()), 4, "max", 0.2),
    "sentence": lambda: SentenceEncoder(BertModel(config()), 8, "first"),
    "two_towers": lambda: BiEncoder(SentenceEncoder(BertModel(config()), 8)),
    "bilstm": lambda: BiLSTM(4, 30, embedding_size=6, hidden_size=4, pooling="attention"),
}
NEEDS: dict[str, dict[str, bool]] = {"classes": {}, "tokens": {"per_token": True}, "embedding": {"embeds": True}}


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("kind", TRAINED)
def test_the_body_is_the_same_and_the_head_is_new(kind: str, needs: str) -> None:
    trained: nn.Module = TRAINED[kind]()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    made, kept = with_new_head(trained, 5, **NEEDS[needs])
    assert made.training
    output = run_network(made, BATCH).logits
    assert output.shape == ((3, 6, 5) if needs == "tokens" else (3, 5))
    weights = made.state_dict()
    assert kept
    head = [name for name in weights if name not in kept and not name.startswith("attention.")]
    assert head
    assert all(name.startswith("classifier.") for name in head)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    if kind != "bilstm":
        assert not set(map(id, made.parameters())) & set(map(id, trained.parameters()))
    again = from_description(describe(made) or {})
    assert again.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind != "bilstm"])
def test_hidden_states_do_not_change(kind: str) -> None:
    """Whatever names the weights have, the encoder computes what it did."""
    trained: Any = TRAINED[kind]().eval()
    inner = getattr(trained, "network", trained)
    states = (inner.encoder if hasattr(inner, "encoder") else inner.bert)(**BATCH).last_hidden_state
    for needs in NEEDS.values():
        made: Any = with_new_head(trained, 5, **needs)[0].eval()
        encoder = made.base_model if needs.get("per_token") else made.encoder
        torch.testing.assert_close(encoder(**BATCH).last_hidden_state, states)


def test_a_network_that_pooled_nothing_of_ours_pools_the_mean() -> None:
    pooled, _ = with_new_head(BertForMaskedLM(config()), 5)
    assert isinstance(pooled, PooledClassifier)
    assert pooled.pooling == "mean"


def test_pooling_and_factorised_embeddings_stay() -> None:
    trained = PooledClassifier(BertModel(config()), 4, "max", 0.2)
    factorise_embedding(trained.encoder, 3)  # type: ignore[arg-type]
    pooled, _ = with_new_head(trained, 5)
    assert isinstance(pooled, PooledClassifier)
    assert (pooled.pooling, pooled.dropout.p) == ("max", 0.2)
    tagger, kept = with_new_head(trained, 5, per_token=True)
    assert "bert.embeddings.word_embeddings.table.weight" in kept
    torch.testing.assert_close(
        tagger.eval().base_model(**BATCH).last_hidden_state,  # type: ignore[operator]
        trained.eval().encoder(**BATCH).last_hidden_state,
    )


def test_networks_without_such_a_head_are_refused() -> None:
    with pytest.raises(ConfigError, match="TextCNN predicts for a text, and the data need each token"):
        with_new_head(TextCNN(4, 30, embedding_size=6), 5, per_token=True)
    with pytest.raises(ConfigError, match="a Linear has no body that could have another head"):
        with_new_head(nn.Linear(2, 3), 5)
    images = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    with pytest.raises(ConfigError, match="a ViTForImageClassification has no body that could have another head"):
        with_new_head(ViTForImageClassification(images), 5)
