"""A trained network with a head for other outputs: its body keeps its weights."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel

from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.models.masked_lm import MaskedLM
from kd_lightning.models.rebuild import factorise_embedding, fresh_network
from kd_lightning.models.sentence_encoder import SentenceEncoder
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.runtime.errors import ConfigError


def with_new_head(
    network: nn.Module, num_classes: int, per_token: bool = False, embeds: bool = False
) -> tuple[nn.Module, list[str]]:
    """Return a network with another's body and a fresh head, and the names of the body's weights.

    A `BiLSTM` or `TextCNN` has another classifier. The encoder of a network of `transformers`, or inside of a
    `BiEncoder` or `MaskedLM`, becomes a token classifier of `transformers`, a `SentenceEncoder`, or a
    `PooledClassifier`; the last two with the pooling that the network had, or the mean over the words where it had none
    of ours.

    Args:
        network: A trained one.
        num_classes: How many outputs the new one has.
        per_token: It predicts for each token.
        embeds: Its output is an embedding.

    Raises:
        ConfigError: It is not known what is body and what head of the network, or there is no such head.
    """
    network = network.network if isinstance(network, BiEncoder | MaskedLM) else network
    if isinstance(network, BiLSTM | TextCNN):
        arguments = {**network.arguments, "num_classes": num_classes, "per_token": per_token}
        takes = inspect.signature(type(network)).parameters
        if per_token and "per_token" not in takes:
            raise ConfigError(f"{type(network).__name__} predicts for a text, and the data need each token")
        made: nn.Module = type(network)(**{name: value for name, value in arguments.items() if name in takes})
        return made, _copied(made, network, "", "classifier.")
    encoder, pooling, dropout = _encoder(network)
    if per_token:
        made = _tagger(encoder, num_classes)
        return made, _copied(made.base_model, encoder, f"{made.base_model_prefix}.")
    encoder = copy.deepcopy(encoder)
    if embeds:
        made = SentenceEncoder(encoder, num_classes, pooling)
    else:
        made = PooledClassifier(encoder, num_classes, pooling, dropout)
    return made.train(), [f"encoder.{name}" for name in encoder.state_dict()]


def _encoder(network: nn.Module) -> tuple[PreTrainedModel, Any, float]:
    """Return a network's encoder, and the pooling and dropout of its head."""
    if isinstance(network, PooledClassifier):
        dropout = 0.1 if isinstance(network, SentenceEncoder) else network.dropout.p
        return network.encoder, network.pooling, dropout  # type: ignore[return-value]
    reads_text = getattr(network, "main_input_name", None) == "input_ids"
    if isinstance(network, PreTrainedModel) and network.base_model is not network and reads_text:
        return network.base_model, "mean", 0.1  # type: ignore[return-value]
    raise ConfigError(
        f"a {type(network).__name__} has no body that could have another head: networks of transformers for text, "
        "bilstm and text_cnn have one"
    )


def _tagger(encoder: PreTrainedModel, num_classes: int) -> PreTrainedModel:
    """Return a token classifier of `transformers` for an encoder's architecture, with fresh weights."""
    config: PreTrainedConfig = copy.deepcopy(encoder.config)
    config.num_labels = num_classes
    kind: Any = AutoModelForTokenClassification._model_mapping.get(type(config), None)
    if kind is None:
        raise ConfigError(f"transformers has no token classifier of the kind of {type(encoder).__name__}")
    network = fresh_network(kind, config, config._attn_implementation)
    if isinstance(embedding := encoder.get_input_embeddings(), FactorizedEmbedding):
        factorise_embedding(network, embedding.rank)
    return network


def _copied(target: nn.Module, source: nn.Module, prefix: str, head: str | None = None) -> list[str]:
    """Copy the weights that both have but for a head; return their names, after the prefix."""
    weights, there = source.state_dict(), target.state_dict()
    names = [name for name in there if name in weights and not (head and name.startswith(head))]
    target.load_state_dict({name: weights[name] for name in names}, strict=False)
    return [prefix + name for name in names]
