from __future__ import annotations

from torch import nn

from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.models.size import count_parameters


def test_counts_with_and_without_embeddings() -> None:
    network = nn.Sequential(nn.Embedding(10, 4), nn.EmbeddingBag(3, 2), nn.Linear(4, 2), nn.BatchNorm1d(2))
    assert count_parameters(network) == (40 + 6 + 10 + 4, 10 + 4)


def test_factorised_embedding_counts_as_embedding_as_a_whole() -> None:
    assert count_parameters(nn.Sequential(FactorizedEmbedding(10, 2, 6), nn.Linear(6, 1))) == (20 + 12 + 7, 7)


def test_shared_parameters_count_once_and_as_embedding() -> None:
    table, output = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    output.weight = table.weight
    assert count_parameters(nn.Sequential(table, output)) == (40, 0)
