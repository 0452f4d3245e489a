"""The neutral names of many architectures, and of a user's own network: qkv, feature_maps, feature_names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.cnn import CNN, ResNet
from kd_lightning.models.features import FeatureTap, depth
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch
from tests.models.tiny import batch as text
from tests.models.tiny import tiny

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 12,
         "image_size": 8, "patch_size": 4, "num_labels": 3}  # fmt: skip


def images(size: int = 8, channels: int = 3) -> Batch:
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(2, channels, size, size), "labels": torch.tensor([0, 1])}


# -- transformers -----------------------------------------------------------------------------------------------------


def of_bert(network: PreTrainedModel, layer: int, states: Tensor) -> list[Tensor]:
    attention = network.base_model.encoder.layer[layer].attention.self
    return [attention.query(states), attention.key(states), attention.value(states)]


def of_distilbert(network: PreTrainedModel, layer: int, states: Tensor) -> list[Tensor]:
    attention = network.base_model.transformer.layer[layer].attention
    return [attention.q_lin(states), attention.k_lin(states), attention.v_lin(states)]


def of_vit(network: PreTrainedModel, layer: int, states: Tensor) -> list[Tensor]:
    block = network.base_model.layers[layer]
    states = block.layernorm_before(states)
    return [block.attention.q_proj(states), block.attention.k_proj(states), block.attention.v_proj(states)]


Projections = Callable[[PreTrainedModel, int, Tensor], list[Tensor]]
TRANSFORMERS: dict[str, tuple[Callable[[], PreTrainedModel], Batch, Projections]] = {
    "bert": (lambda: tiny("bert", layers=3), text(), of_bert),
    "roberta": (lambda: tiny("roberta", layers=3), text(), of_bert),
    "electra": (lambda: tiny("electra", layers=3), text(), of_bert),
    "distilbert": (lambda: tiny("distilbert", layers=3), text(), of_distilbert),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SIZES)), images(), of_vit),
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**SIZES)), images(), of_vit),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_queries_keys_and_values_explain_the_attention(name: str) -> None:
    build, batch, projections = TRANSFORMERS[name]
    network = build().eval()
    assert depth(network, "qkv") == depth(network, "attention") == depth(network, "hidden") == 3
    names = ["hidden[1]", "qkv[1]", "qkv[-2]", "attention[1]"]
    output = FeatureTap(network, names)(batch)
    qkv = output.features["qkv[1]"]
    assert torch.equal(qkv, output.features["qkv[-2]"])
    torch.testing.assert_close(qkv, torch.stack(projections(network, 1, output.features["hidden[1]"]), dim=2))

    query, key, _ = (x.unflatten(2, (2, 4)).transpose(1, 2) for x in qkv.unbind(2))  # two heads of width 4
    scores = query @ key.mT / 2.0
    if "attention_mask" in batch:
        scores = scores.masked_fill(batch["attention_mask"][:, None, None] == 0, -1e9)
    torch.testing.assert_close(output.features["attention[1]"], scores.softmax(-1))

    network.zero_grad()
    qkv.square().sum().backward()
    reached = {path for path, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layer.0" in path or "layers.0" in path for path in reached)
    assert not any("layer.2" in path or "layers.2" in path for path in reached)


def test_hidden_states_of_a_vision_transformer_are_hugging_faces() -> None:
    network = ViTForImageClassification(ViTConfig(**SIZES)).eval()
    expected = network(pixel_values=images()["pixel_values"], output_hidden_states=True).hidden_states
    features = FeatureTap(network, [f"hidden[{i}]" for i in range(4)])(images()).features
    assert [x.shape for x in features.values()] == [(2, 5, 8)] * 4
    for found, state in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(found, state)


# -- feature maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet", "regnet", "convnext"])
def test_feature_maps_of_hugging_faces_convolutional_networks(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 3}
    network = {
        "resnet": lambda: ResNetForImageClassification(ResNetConfig(**sizes, embedding_size=8, layer_type="basic")),
        "regnet": lambda: RegNetForImageClassification(RegNetConfig(**sizes, embedding_size=8, groups_width=4)),
        "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**sizes, num_stages=2)),
    }[kind]().eval()
    expected = network(pixel_values=images(32)["pixel_values"], output_hidden_states=True).hidden_states
    assert depth(network, "feature_maps") == 2
    features = FeatureTap(network, ["feature_maps[0]", "feature_maps[-1]", "pooled"])(images(32)).features
    torch.testing.assert_close(features["feature_maps[0]"], expected[1])
    torch.testing.assert_close(features["feature_maps[-1]"], expected[2])
    assert features["pooled"].shape == (2, 12)


class Numbered(nn.Module):
    """Named as torchvision's ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.layer1, self.layer2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


class Timm(nn.Module):
    """With the attributes of a timm network; `forward` returns a Tensor and takes an `x`, as theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3))
        self.classifier = nn.Linear(6, 3)
        self.feature_info = [
            {"num_chs": 4, "reduction": 1, "module": "stem"},
            {"num_chs": 6, "reduction": 1, "module": "blocks.1"},
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class TimmTransformer(Timm):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.blocks = nn.Conv2d(3, 6, 4, 4), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.feature_info = [{"num_chs": 6, "reduction": 4, "module": f"blocks.{i}"} for i in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.patch_embed(x).flatten(2).mT).mean(1))


def test_feature_maps_by_torchvisions_names() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), Numbered()).eval()  # also inside another module
    assert depth(network, "feature_maps") == 2
    features = FeatureTap(network, ["feature_maps[0]", "feature_maps[1]", "1.layer1"])(images()).features
    assert features["feature_maps[1]"].shape == (2, 6, 2, 2)
    assert torch.equal(features["feature_maps[0]"], features["1.layer1"])


def test_feature_maps_and_tokens_by_timms_feature_info() -> None:
    network = Timm()
    assert depth(network, "feature_maps") == 2
    features = FeatureTap(network, ["feature_maps[0]", "feature_maps[-1]", "pooled"])(images()).features
    assert [tuple(x.shape) for x in features.values()] == [(2, 4, 6, 6), (2, 6, 2, 2), (2, 6)]
    assert torch.equal(features["feature_maps[0]"], network.stem(images()["pixel_values"]))

    tokens = TimmTransformer()
    assert depth(tokens, "hidden") == 2
    features = FeatureTap(tokens, ["hidden[0]", "hidden[1]", "hidden[2]", "embeddings"])(images()).features
    assert features["embeddings"].shape == (2, 4, 6)
    assert torch.equal(features["hidden[1]"], tokens.blocks[0](features["hidden[0]"]))
    assert torch.equal(features["hidden[2]"], tokens.blocks[1](features["hidden[1]"]))
    with pytest.raises(
        ConfigError, match=r"TimmTransformer has no feature_maps\[i\]; it has hidden\[0..2\], embeddings"
    ):
        depth(tokens, "feature_maps")


def test_what_is_no_map_is_refused() -> None:
    network = Timm()
    network.output_fmt = "NHWC"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"Timm has no feature_maps"):
        depth(network, "feature_maps")
    network = Timm()
    network.feature_info[1]["module"] = "classifier"
    with pytest.raises(ConfigError, match=r"'feature_maps\[1\]' is \(2, 3\), not a map \(B, C, H, W\)"):
        FeatureTap(network, ["feature_maps[1]"])(images())


# -- a network that names its features --------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(30, 4), nn.Linear(4, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.feature_names = names

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(self.table(input_ids))))).mean(1))


NAMES = {"embeddings": "table", "hidden[0]": "table", "hidden[1]": "first", "hidden[2]": "second", "scores": "head"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_of_ones_own(wrapped: bool) -> None:
    own = Own(NAMES)
    network = nn.Sequential(own, nn.Identity()) if wrapped else own
    assert depth(network, "hidden") == 2
    output = FeatureTap(network, ["hidden[-1]", "hidden[1]", "embeddings", "scores", "pooled"])(text())
    embeddings = own.table(text()["input_ids"])
    expected = {"embeddings": embeddings, "hidden[1]": own.first(embeddings), "scores": output.logits}
    expected["hidden[-1]"] = own.second(F.relu(expected["hidden[1]"]))
    for name, value in expected.items():
        assert torch.equal(output.features[name], value), name
    assert torch.equal(output.features["pooled"], F.relu(expected["hidden[-1]"]).mean(1))
    with pytest.raises(ConfigError, match=r"hidden\[i\] takes i from -3 to 2"):
        FeatureTap(network, ["hidden[3]"])


def test_ones_own_name_goes_before_ours() -> None:
    output = FeatureTap(Own({"pooled": "first"}), ["pooled"])(text())
    assert output.features["pooled"].shape == (2, 5, 6)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            {"hidden[0]": "tabel"},
            r"Own.feature_names: hidden\[0\] is 'tabel', not a module of it; did you mean 'table'",
        ),
        ({"hidden[0]": "table", "hidden[2]": "first"}, r"Own.feature_names: hidden\[1\] is missing"),
        ({"hidden[1]": "table"}, r"Own.feature_names: hidden\[0\] is missing"),
    ],
)
def test_wrong_names_of_ones_own(names: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FeatureTap(Own(names), ["pooled"])


@pytest.mark.parametrize("network", [CNN(3, widths=(4, 6)), ResNet(3, depth=8, width=0.25)], ids=["cnn", "resnet"])
def test_ours_name_their_feature_maps(network: nn.Module) -> None:
    count = depth(network, "feature_maps")
    names = [f"feature_maps[{i}]" for i in range(count)]
    output = FeatureTap(network.eval(), [*names, "pooled"])(images())
    widths = {2: [4, 6], 3: [4, 8, 16]}[count]
    assert [tuple(output.features[name].shape) for name in names] == [
        (2, width, 8 >> i, 8 >> i) for i, width in enumerate(widths)
    ]
    torch.testing.assert_close(output.features[names[-1]].mean((2, 3)), output.features["pooled"])
    torch.testing.assert_close(network.classifier(output.features["pooled"]), output.logits)  # type: ignore[operator]
    output.features[names[0]].sum().backward()
    assert next(network.parameters()).grad is not None


def test_a_bilstms_states_stand_where_the_words_stand() -> None:
    torch.manual_seed(0)
    network = BiLSTM(3, 30, embedding_size=6, hidden_size=5, num_layers=2).eval()
    names = ["embeddings", "hidden[0]", "hidden[1]", "hidden[2]", "pooled"]
    tap = FeatureTap(network, names)
    assert depth(network, "hidden") == 2
    words = torch.tensor([[4, 5, 6]])
    short = tap({"input_ids": words}).features
    torch.testing.assert_close(short["embeddings"], network.embedding(words))
    torch.testing.assert_close(short["hidden[2]"].amax(1), short["pooled"])  # max pooling, no dropout
    for places in ([0, 1, 2], [3, 4, 5], [0, 3, 5]):  # padding on the right, on the left, in between
        input_ids, mask = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64)
        input_ids[:, places], mask[:, places] = words, 1
        for batch in ({"input_ids": input_ids}, {"input_ids": input_ids, "attention_mask": mask}):
            features = tap(batch).features
            for name in names[:-1]:
                torch.testing.assert_close(features[name][:, places], short[name])
                assert not features[name][mask == 0].any()
    tap({"input_ids": words}).features["hidden[1]"].sum().backward()
    assert network.forward_layers[0].weight_hh_l0.grad.abs().sum() > 0  # type: ignore[union-attr, operator]
    assert network.forward_layers[1].weight_hh_l0.grad is None
    assert not any(name.startswith("states") for name in network.state_dict())  # old checkpoints load
