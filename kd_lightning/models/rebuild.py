"""Describe a network as plain JSON, and rebuild it without its teacher or pretrained weights.

A run folder keeps the description beside the weights (safetensors), so that the run can be loaded on a machine that
has neither the pretrained checkpoint nor a network. It covers what the factories of this package make; a user's own
network has no description and is built again from the Hydra config it came from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kd_lightning.models.adapt import unwrap
from kd_lightning.models.attention import PROBABILITIES
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.cnn import CNN, ResNet
from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.models.hf import PooledClassifier, Pooling, check_attention, check_attentions
from kd_lightning.models.masked_lm import MaskedLM
from kd_lightning.models.sentence_encoder import SentenceEncoder
from kd_lightning.models.simkd import SimKDStudent
from kd_lightning.models.static_embedding import StaticEmbedding
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.models.timm import timm_model
from kd_lightning.runtime.errors import ConfigError


def describe(network: nn.Module) -> dict[str, Any] | None:
    """Return what `from_description` needs to build this architecture again, as JSON-able values.

    Args:
        network: Any network; compiled and DDP-wrapped ones are looked into.

    Returns:
        A dict with `_target_` and its arguments (also what `hydra.utils.instantiate` takes), or None when the network
        is not a `BiLSTM`, `TextCNN`, `StaticEmbedding`, `CNN` or `ResNet`, a `timm_model`, a `SimKDStudent` around a
        network that has one, a model class of the `transformers` library, or a `PooledClassifier`, `SentenceEncoder`,
        `BiEncoder`, `CausalLM` or `MaskedLM` around one.
    """
    network = unwrap(network)
    if isinstance(network, PooledClassifier):
        encoder = describe(network.encoder)
        if encoder is None:
            return None
        head = {"num_classes": network.num_classes, "pooling": network.pooling, "dropout": network.dropout.p}
        if isinstance(network, SentenceEncoder):
            own = {"normalise": network.normalise, "projects": network.projects}
            return {"_target_": _name(SentenceEncoder), "encoder": encoder, **head, **own}
        return {"_target_": _name(pooled_classifier), "encoder": encoder, **head}
    if isinstance(network, BiEncoder | CausalLM | MaskedLM):
        inner = describe(network.network)
        return None if inner is None else {"_target_": _name(type(network)), "network": inner, **network.arguments}
    if isinstance(network, SimKDStudent):
        backbone = describe(network.backbone)
        return (
            None if backbone is None else {"_target_": _name(SimKDStudent), "backbone": backbone, **network.arguments}
        )
    if isinstance(network, BiLSTM | TextCNN | StaticEmbedding | CNN | ResNet):
        return {"_target_": _name(type(network)), **network.arguments}
    if type(network).__module__.startswith("timm.") and isinstance(
        arguments := getattr(network, "arguments", None), dict
    ):
        return {"_target_": _name(timm_model), **arguments}
    if not isinstance(network, PreTrainedModel) or _architecture(type(network).__name__) is not type(network):
        return None
    config = json.loads(network.config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "dtype"):  # a path of this machine; how the checkpoint was stored
        config.pop(key, None)
    embedding = network.get_input_embeddings()
    implementation = network.config._attn_implementation
    return {
        "_target_": _name(hugging_face),
        "architecture": type(network).__name__,
        "config": config,
        "embedding_rank": embedding.rank if isinstance(embedding, FactorizedEmbedding) else None,
        "attn_implementation": None if implementation == PROBABILITIES else implementation,  # registered by a tap only
    }


def versions(network: nn.Module) -> dict[str, int]:
    """Return the versions of the classes that a network is made of, by name.

    A class of one's own has a `VERSION` too if it wants one: raised by hand when its `forward` means something else,
    it makes what a teacher of this class has predicted before unusable.
    """
    found = {type(module).__qualname__: getattr(module, "VERSION", None) for module in unwrap(network).modules()}
    return {name: version for name, version in found.items() if isinstance(version, int)}


def is_description(settings: dict[str, Any]) -> bool:
    """Return True when `from_description` can build these settings."""
    return str(settings.get("_target_")) in _BUILDERS


def from_description(description: dict[str, Any]) -> nn.Module:
    """Build the network of a description with fresh weights; load its state dict afterwards.

    Only this module's own builders and the model classes of `transformers` can be reached from a description, so
    the description in a downloaded run folder runs no other code.

    Raises:
        ConfigError: Not a description of `describe`, or a class this version of `transformers` does not have.
    """
    builder = _BUILDERS.get(str(description.get("_target_")))
    if builder is None:
        raise ConfigError(
            f"_target_={description.get('_target_')!r} is not a network description; known: {', '.join(_BUILDERS)}"
        )
    arguments = {key: value for key, value in description.items() if key != "_target_"}
    for part in ("encoder", "backbone", "network"):
        if isinstance(arguments.get(part), dict):
            arguments[part] = from_description(arguments[part])
    try:
        return builder(**arguments)
    except TypeError as error:
        raise ConfigError(f"the network description does not match {description['_target_']}: {error}") from error


def hugging_face(
    architecture: str,
    config: dict[str, Any],
    embedding_rank: int | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build a model class of `transformers` from its config, with fresh weights and in training mode.

    Args:
        architecture: Class name, such as `BertForSequenceClassification`.
        config: The class's config, as a dict.
        embedding_rank: Rank of a `FactorizedEmbedding` in place of the word embeddings; None: the full table.
        attn_implementation: `sdpa`, `eager`, ...; None: the default.

    Raises:
        ConfigError: `transformers` has no such model class.
    """
    check_attention(attn_implementation, "attn_implementation of the network description")
    check_attentions(config, "config of the network description")
    kind = _architecture(architecture)
    if kind is None:
        raise ConfigError(
            f"architecture={architecture!r} is not a model class of transformers {transformers.__version__}: "
            "install the version the network was saved with"
        )
    network = fresh_network(kind, kind.config_class.from_dict(config), attn_implementation)  # type: ignore[union-attr]
    if embedding_rank is not None:
        factorise_embedding(network, embedding_rank)
    return network


def fresh_network(
    kind: type[PreTrainedModel], config: PreTrainedConfig, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build a network of this class with fresh float32 weights, whatever the checkpoint's dtype."""
    network: PreTrainedModel = kind._from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=attn_implementation, dtype=torch.float32
    )
    return network


def pooled_classifier(encoder: nn.Module, num_classes: int, pooling: Pooling, dropout: float) -> PooledClassifier:
    """Build a `PooledClassifier` around an encoder that was built by `hugging_face`."""
    return PooledClassifier(encoder, num_classes, pooling, dropout)


def factorise_embedding(network: PreTrainedModel, rank: int) -> FactorizedEmbedding:
    """Replace a network's word embeddings by a fresh `FactorizedEmbedding` of this rank; return it."""
    full = network.get_input_embeddings()
    rows, width = full.weight.shape  # type: ignore[misc]
    std = getattr(network.config, "initializer_range", 0.02)
    factorised = FactorizedEmbedding(rows, rank, width, padding_idx=full.padding_idx, std=std)  # type: ignore[arg-type]
    network.set_input_embeddings(factorised)
    return factorised


def _architecture(name: str) -> type[PreTrainedModel] | None:
    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _name(builder: Callable[..., nn.Module]) -> str:
    return f"{builder.__module__}.{builder.__qualname__}"


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    _name(builder): builder
    for builder in (
        hugging_face,
        pooled_classifier,
        SentenceEncoder,
        BiEncoder,
        CausalLM,
        MaskedLM,
        BiLSTM,
        TextCNN,
        StaticEmbedding,
        CNN,
        ResNet,
        SimKDStudent,
        timm_model,
    )
}
