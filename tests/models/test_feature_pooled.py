"""`pooled` is what goes into the dropout in front of the classifier, and the network's logits stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.cnn import CNN
from kd_lightning.models.features import FeatureTap
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.models.simkd import SimKDStudent
from kd_lightning.types import Batch
from tests.models.test_features import BATCH, BERT

QUIET = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def check_pooled_in_training(network: nn.Module, batch: Batch) -> None:
    """The classifier, on a dropout of `pooled` with the same random numbers, gives the logits."""
    untouched = copy.deepcopy(network.train())
    tap = FeatureTap(network, ["pooled"])
    torch.manual_seed(1)
    output = tap(batch)
    torch.manual_seed(1)
    expected = run_network(untouched, batch).logits
    assert torch.equal(output.logits, expected)
    pooled = output.features["pooled"]
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    assert not torch.allclose(head(pooled), output.logits)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(pooled, tap(batch).features["pooled"])  # nothing was dropped, or scaled
    pooled.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


class Inplace(nn.Sequential):
    """A dropout that works in place, as in torchvision's MobileNetV2."""

    def __init__(self, *after: nn.Module) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5, inplace=True), *after, nn.Linear(8, 3))


POINTS: Batch = {"pixel_values": torch.linspace(-1, 1, 48).view(4, 3, 2, 2).sin()}


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (lambda: BertForSequenceClassification(BertConfig(**QUIET, num_labels=3, classifier_dropout=0.5)), BATCH),
        (
            lambda: DistilBertForSequenceClassification(
                DistilBertConfig(vocab_size=30, dim=8, n_heads=2, n_layers=1, hidden_dim=16, num_labels=3,
                                 dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.5)
            ),
            BATCH,
        ),
        (lambda: PooledClassifier(AutoModel.from_config(BertConfig(**QUIET)), 3, dropout=0.5), BATCH),
        (lambda: CNN(3, dropout=0.5), POINTS),
        (Inplace, POINTS),
    ],
    ids=["bert", "distilbert", "pooled", "cnn", "inplace"],
)  # fmt: skip
def test_in_training_pooled_is_before_dropout(build: Callable[[], nn.Module], batch: Batch) -> None:
    torch.manual_seed(0)
    check_pooled_in_training(build(), batch)


@pytest.mark.parametrize("pooling", ["max", "attention"])
def test_the_last_call_of_a_dropout_counts(pooling: Any) -> None:
    torch.manual_seed(0)
    network = BiLSTM(3, 30, embedding_size=8, hidden_size=4, num_layers=2, pooling=pooling, dropout=0.5).train()
    untouched = copy.deepcopy(network)
    read: list[Tensor] = []
    untouched.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    torch.manual_seed(1)
    output = FeatureTap(network, ["pooled"])(BATCH)
    torch.manual_seed(1)
    assert torch.equal(output.logits, run_network(untouched, BATCH).logits)
    dropped, pooled = read[0], output.features["pooled"]
    assert 0 < (dropped == 0).sum() < dropped.numel()
    assert (pooled != 0).all()
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, 2 * pooled))


def test_roberta_drops_twice_with_one_dropout() -> None:
    network = RobertaForSequenceClassification(RobertaConfig(**QUIET, num_labels=3, classifier_dropout=0.5)).train()
    head = network.classifier
    put_out: list[Tensor] = []
    head.dropout.register_forward_hook(lambda module, args, output: put_out.append(output))
    pooled = FeatureTap(network, ["pooled"])(BATCH).features["pooled"]
    assert len(put_out) == 2
    torch.testing.assert_close(pooled, head.dense(put_out[0]).tanh())


class Functional(nn.Sequential):
    """A dropout without a module, as in some of timm's networks; the other's output goes elsewhere."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self[3](F.dropout(self[2](self[1](self[0](x.flatten(1)))), 0.5, self.training))


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)], ids=["relu", "inplace"])
def test_without_a_dropout_in_front_pooled_is_what_the_classifier_reads(relu: nn.Module) -> None:
    torch.manual_seed(0)
    late = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), relu, nn.Linear(8, 3))
    for network in (late, Inplace(relu), Functional()):
        untouched = copy.deepcopy(network.train())
        for mode in (True, False):
            torch.manual_seed(1)
            output = FeatureTap(network.train(mode), ["pooled"])(POINTS)
            torch.manual_seed(1)
            assert torch.equal(output.logits, run_network(untouched.train(mode), POINTS).logits)
            torch.testing.assert_close(network[-1](output.features["pooled"]), output.logits)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_pooled_without_autograd(context: Callable[[], AbstractContextManager[None]]) -> None:
    torch.manual_seed(0)
    for network in (BiLSTM(3, 30, embedding_size=8, hidden_size=4, dropout=0.5), Inplace()):
        batch = POINTS if isinstance(network, Inplace) else BATCH
        with context():
            assert (FeatureTap(network.train(), ["pooled"])(batch).features["pooled"] != 0).all()
            output = FeatureTap(network.eval(), ["pooled"])(batch)
            head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
            torch.testing.assert_close(head(output.features["pooled"]), output.logits)


def test_pooled_of_a_simkd_student_is_its_projection() -> None:
    torch.manual_seed(0)
    network = SimKDStudent(BiLSTM(3, 30, embedding_size=8, hidden_size=4, dropout=0.5), 6, 3).train()
    output = FeatureTap(network, ["pooled", "simkd_projector"])(BATCH)
    assert output.features["pooled"] is output.features["simkd_projector"]
    assert torch.equal(network.classifier(output.features["pooled"]), output.logits)
