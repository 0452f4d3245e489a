"""Features are read, and gradients flow from them, whatever runs the network: torch.compile, checkpointing, DDP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.cnn import CNN
from kd_lightning.models.features import FeatureTap
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch, ModelOutput
from tests.models.tiny import batch as text
from tests.models.tiny import tiny
from tests.pair import in_two

IMAGES: Batch = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).sin()}
TRANSFORMER = ["hidden[0]", "hidden[1]", "hidden[-1]", "attention[0]", "qkv[1]", "pooled"]
VIT = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12, "image_size": 8,
       "patch_size": 4, "num_labels": 3}  # fmt: skip


def networks() -> dict[str, tuple[Callable[[], nn.Module], Batch, list[str]]]:
    return {
        "bert": (lambda: tiny("bert", layers=2), text(), [*TRANSFORMER, "bert.encoder.layer.0.output"]),
        "distilbert": (lambda: tiny("distilbert", layers=2), text(), TRANSFORMER),
        "vit": (lambda: ViTForImageClassification(ViTConfig(**VIT)), IMAGES, TRANSFORMER),
        "bilstm": (
            lambda: BiLSTM(3, 30, embedding_size=6, hidden_size=4),
            text(),
            ["hidden[0]", "hidden[1]", "pooled"],
        ),
        "cnn": (lambda: CNN(3, widths=(4, 6)), IMAGES, ["feature_maps[0]", "feature_maps[-1]", "pooled"]),
    }


def step(tap: FeatureTap, batch: Batch) -> tuple[ModelOutput, dict[str, Tensor]]:
    """One step's output, and the gradients of a loss on its features alone."""
    tap.network.zero_grad()
    torch.manual_seed(3)
    output = tap(batch)
    sum(value.square().sum() for value in output.features.values()).backward()  # type: ignore[union-attr]
    parameters = tap.network.named_parameters()
    return output, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters}


def same(found: tuple[ModelOutput, dict[str, Tensor]], expected: tuple[ModelOutput, dict[str, Tensor]]) -> None:
    for name, value in expected[0].features.items():
        torch.testing.assert_close(found[0].features[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(found[0].logits, expected[0].logits, rtol=1e-4, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert sum(bool(gradient.any()) for gradient in expected[1].values()) > 1
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


# -- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(kind: str, order: str, backend: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    build, batch, names = networks()[kind]
    torch.manual_seed(0)
    network = build().eval()
    expected = step(FeatureTap(copy.deepcopy(network), names), batch)
    if order == "compiled, tapped":
        network.compile(dynamic=True, backend=backend)
        tap = FeatureTap(network, names)
    elif order == "tapped, compiled":
        tap = FeatureTap(network, names)
        network.compile(dynamic=True, backend=backend)
    else:
        tap = FeatureTap(torch.compile(network, dynamic=True, backend=backend), names)
        expected = expected[0], {f"_orig_mod.{name}": gradient for name, gradient in expected[1].items()}
    for _ in range(2):
        same(step(tap, batch), expected)
    torch.testing.assert_close(run_network(tap.network, batch).logits, expected[0].logits, rtol=1e-4, atol=1e-5)
    assert tap._read == {}
    same(step(tap, batch), expected)  # also after a call without features
    frames = torch._dynamo.utils.counters["frames"]
    if backend == "eager" and order != "wrapped" and kind != "bilstm":  # torch.compile breaks the graph at an LSTM
        assert frames["total"] == frames["ok"] == 2  # one graph with the features and one without


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        pytest.param("bert", "compiled, tapped", marks=pytest.mark.slow),
        pytest.param("bert", "tapped, compiled", marks=pytest.mark.slow),
        ("bilstm", "tapped, compiled"),
        ("cnn", "compiled, tapped"),
        ("cnn", "wrapped"),
    ],
)
def test_compiled(kind: str, order: str) -> None:
    compiled(kind, order, "eager")


def compiled_in_training(kind: str, order: str, backend: str) -> None:
    """What is compiled draws other random numbers, so only the classifier's dropout is left on."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    build, batch, _ = networks()[kind]
    torch.manual_seed(0)
    network = build().train()
    dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.p = 0.0
    expected = step(FeatureTap(copy.deepcopy(network), ["pooled"]), batch)
    dropouts[-1].p = 0.5
    if order == "compiled, tapped":
        network.compile(dynamic=True, backend=backend)
    tap = FeatureTap(network, ["pooled"])
    if order == "tapped, compiled":
        network.compile(dynamic=True, backend=backend)
    for _ in range(3):
        found = step(tap, batch)
        torch.testing.assert_close(found[0].features["pooled"], expected[0].features["pooled"])
        assert not torch.allclose(found[0].logits, expected[0].logits)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, msg=name)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] == frames["ok"] == 1


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("bert", "tapped, compiled"),
        pytest.param("bert", "compiled, tapped", marks=pytest.mark.slow),
        ("cnn", "compiled, tapped"),
        ("cnn", "tapped, compiled"),
    ],
)
def test_compiled_in_training_pooled_is_before_dropout(kind: str, order: str) -> None:
    compiled_in_training(kind, order, "eager")


@pytest.mark.slow
def test_compiled_to_machine_code_in_training_pooled_is_before_dropout() -> None:
    compiled_in_training("cnn", "compiled, tapped", "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "bilstm", "cnn"])
def test_compiled_to_machine_code(kind: str) -> None:
    compiled(kind, "compiled, tapped", "inductor")


def test_a_tap_that_comes_after_the_first_compiled_call_says_so() -> None:
    torch.compiler.reset()
    network = tiny("bert", layers=2)
    network.compile(backend="eager")
    run_network(network, text())
    with pytest.raises(ConfigError, match="must not have run before its FeatureTap is made"):
        FeatureTap(network, ["hidden[1]"])(text())


# -- activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "compile"),
    [("bert", False), ("distilbert", False), ("vit", False), pytest.param("bert", True, marks=pytest.mark.slow)],
)
def test_checkpointed_layers(kind: str, compile: bool) -> None:
    torch.compiler.reset()
    build, batch, names = networks()[kind]
    torch.manual_seed(0)
    network = build().train()
    for module in network.modules() if compile else ():  # the compiled one may draw other random numbers
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = FeatureTap(copy.deepcopy(network), names)
    network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    tap = FeatureTap(network, names)
    if compile:
        network.compile(dynamic=True, backend="eager")
    for _ in range(2):
        same(step(tap, batch), step(plain, batch))
    assert tap._read == {}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_gives_what_lies_between_layers_and_refuses_what_lies_inside() -> None:
    torch.manual_seed(0)
    network = tiny("bert", layers=2).train()
    names = ["hidden[0]", "hidden[1]", "hidden[-1]", "pooled"]
    plain = FeatureTap(copy.deepcopy(network), names)
    network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    same(step(FeatureTap(network, names), text()), step(plain, text()))
    for name in ("attention[0]", "qkv[1]", "bert.encoder.layer.0.output"):
        tap = FeatureTap(network, [name])
        with pytest.raises(ConfigError, match=r"without a graph.*re-entrant.*use_reentrant=False"):
            tap(text())
        with torch.no_grad():  # where no gradient is wanted, it is there
            assert tap(text()).features[name].shape[0] == 2
        network.eval()
        assert tap(text()).features[name].requires_grad
        network.train()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reentrant = nn.Linear(4, 4), reentrant
        self.block = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


def test_checkpoints_in_a_network_of_ones_own() -> None:
    batch, names = {"pixel_values": torch.randn(3, 4)}, ["block.0", "block.2", "first", "pooled"]
    expected = step(FeatureTap(Checkpointed(None), names), batch)
    same(step(FeatureTap(Checkpointed(False), names), batch), expected)
    with pytest.raises(ConfigError, match=r"'block.0' was computed without a graph"):
        FeatureTap(Checkpointed(True), names)(batch)
    same(
        step(FeatureTap(Checkpointed(True), ["first", "pooled"]), batch),
        step(FeatureTap(Checkpointed(None), ["first", "pooled"]), batch),
    )


def test_frozen_layers_are_no_reason_to_refuse() -> None:
    network = tiny("bert", layers=2)
    network.bert.embeddings.requires_grad_(False)
    network.bert.encoder.layer[0].requires_grad_(False)
    assert not FeatureTap(network, ["attention[0]"])(text()).features["attention[0]"].requires_grad


# -- DDP --------------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """As Lightning runs it: DDP around the module whose step calls the tap."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.tap = network, FeatureTap(network, names)

    def forward(self, batch: Batch) -> Tensor:
        return loss(self.tap(batch))


def loss(output: ModelOutput) -> Tensor:
    return output.logits.square().sum() + sum(value.square().sum() for value in output.features.values())


def _rank(rank: int) -> dict[tuple[str, bool], dict[str, Tensor | None]]:
    gradients = {}
    for kind in ("bert", "bilstm"):
        build, batch, names = networks()[kind]
        part = {name: value[rank : rank + 1] for name, value in batch.items()}
        for inside in (True, False):
            torch.manual_seed(0)
            network = build().eval()
            if inside:
                parallel = DistributedDataParallel(Step(network, names))
                value = parallel(part)
            else:
                value = loss(FeatureTap(DistributedDataParallel(network), names)(part))
            value.backward()
            gradients[kind, inside] = {name: p.grad for name, p in network.named_parameters()}
    return gradients


@pytest.mark.slow
def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    found = in_two(_rank, tmp_path)
    for kind in ("bert", "bilstm"):
        build, batch, names = networks()[kind]
        torch.manual_seed(0)
        network = build().eval()
        (loss(FeatureTap(network, names)(batch)) / 2).backward()
        for gradients in found:
            for inside in (True, False):
                for name, p in network.named_parameters():
                    torch.testing.assert_close(gradients[kind, inside][name], p.grad, rtol=1e-4, atol=1e-5)
