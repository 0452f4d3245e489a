"""A small BERT-style encoder with a classifier, from scratch."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.activations import ACT2FN

from kd_lightning.models.hf import PooledClassifier, check_unpooled
from kd_lightning.models.sizes import check_heads
from kd_lightning.runtime.errors import ConfigError, did_you_mean


def transformer(
    num_classes: int,
    vocab_size: int,
    pad_token_id: int = 0,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 2,
    intermediate_size: int = 512,
    max_length: int = 512,
    dropout: float = 0.1,
    hidden_act: str = "gelu",
    pooling: Literal["bert", "mean", "max", "first"] = "bert",
    per_token: bool = False,
) -> nn.Module:
    """Build a BERT-style classifier with fresh weights; the defaults are BERT-tiny's shape.

    Args:
        num_classes: Number of classes.
        vocab_size: Number of token ids.
        pad_token_id: The padding id.
        hidden_size: Width of the hidden states.
        num_layers: Number of encoder layers.
        num_heads: Attention heads per layer; must divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers.
        max_length: Longest sequence in tokens: the number of position embeddings.
        dropout: Probability of dropping a hidden entry or an attention weight.
        hidden_act: Activation of the feed-forward layers, by its `transformers` name.
        pooling: `bert`: a `BertForSequenceClassification`, which classifies the first token's state after another
            layer. `mean` or `max` over the words, `first`: a `PooledClassifier`; with random weights the first token
            has yet to learn to attend to the others.
        per_token: Classify each token: a `BertForTokenClassification`, which pools nothing.

    Returns:
        A network in training mode with scaled-dot-product attention.

    Raises:
        ConfigError: Heads that do not divide the width, an unknown activation or pooling, a pooling of single tokens.
    """
    check_heads(num_heads, hidden_size)
    if hidden_act not in ACT2FN:
        raise ConfigError(f"hidden_act={hidden_act!r} is unknown{did_you_mean(hidden_act, ACT2FN)}")
    options: dict[str, Any] = {"num_labels": num_classes, "attn_implementation": "sdpa"}  # taken by its base class
    config = BertConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        hidden_act=hidden_act,
        **options,
    )
    if per_token:
        check_unpooled(pooling, "bert")
        return BertForTokenClassification(config)
    if pooling == "bert":
        return BertForSequenceClassification(config)
    return PooledClassifier(BertModel(config, add_pooling_layer=False), num_classes, pooling, dropout)
