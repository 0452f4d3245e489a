"""How large a network is."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.models.onnx import OnnxNetwork


class ParameterCount(NamedTuple):
    """Numbers of parameters, each shared parameter counted once."""

    total: int
    without_embeddings: int


def count_parameters(network: nn.Module) -> ParameterCount:
    """Count a network's parameters, with and without those of its embedding tables.

    Embeddings are `nn.Embedding` and `nn.EmbeddingBag` weights (words, positions, segments) and the whole of a
    `FactorizedEmbedding`, its projection included. A weight shared with an embedding (a tied output layer) counts as
    embedding. Students are compared without embeddings because a table costs memory but hardly any time. Of ONNX files
    it is their graphs' weights.

    >>> count_parameters(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)))
    ParameterCount(total=50, without_embeddings=10)
    """
    kinds = (nn.Embedding, nn.EmbeddingBag, FactorizedEmbedding)
    embeddings = {p for module in network.modules() if isinstance(module, kinds) for p in module.parameters()}
    total = sum(p.numel() for p in network.parameters())
    others = [module.counts for module in network.modules() if isinstance(module, OnnxNetwork)]
    without = total - sum(p.numel() for p in embeddings) + sum(without for _, without in others)
    return ParameterCount(total + sum(count for count, _ in others), without)
