"""Tiny Hugging Face networks for tests: no files, no network."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 30
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}


def tiny(kind: str, num_classes: int = 2, layers: int = 4) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": layers, "num_labels": num_classes}
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**shape))
    if kind == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(**shape))
    if kind == "electra":
        return ElectraForSequenceClassification(ElectraConfig(**shape, embedding_size=6))
    assert kind == "distilbert"
    sizes = {"vocab_size": VOCABULARY, "dim": 8, "n_heads": 2, "hidden_dim": 12, "n_layers": layers}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=num_classes))


KINDS = ("bert", "roberta", "electra", "distilbert")


def batch() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[2, 9, 8, 3, 1], [2, 11, 3, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "token_type_ids": torch.zeros(2, 5, dtype=torch.int64),
        "labels": torch.tensor([0, 1]),
    }
