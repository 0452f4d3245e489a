"""The factory, with a stand-in for timm: torchvision, which timm imports, needs a torch of the same build."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.models.features import FeatureTap, depth
from kd_lightning.models.timm import timm_model
from kd_lightning.runtime.errors import ConfigError


class Network(nn.Module):
    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(in_chans, 4, 3), nn.Conv2d(4, 6, 3)
        self.drop, self.fc = nn.Dropout(drop_rate), nn.Linear(6, num_classes)
        self.feature_info = [{"num_chs": 4, "module": "layer1"}, {"num_chs": 6, "module": "layer2"}]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.layer2(self.layer1(x)).mean((2, 3))))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def create_model(name: str, pretrained: bool, **options: Any) -> nn.Module:
        calls.append({"name": name, "pretrained": pretrained, **options})
        if pretrained:
            raise OSError("no connection")
        return Network(**options).eval()

    library: Any = ModuleType("timm")
    library.__version__, library.create_model = "1.0", create_model
    library.list_models = lambda: ["resnet18", "resnet34"]
    library.is_model = lambda name: name in library.list_models()
    monkeypatch.setitem(sys.modules, "timm", library)
    return calls


def test_a_model_by_name(stand_in: list[dict[str, Any]]) -> None:
    network = timm_model("resnet18", 5, channels=1, drop_rate=0.25)
    assert stand_in == [{"name": "resnet18", "pretrained": False, "num_classes": 5, "in_chans": 1, "drop_rate": 0.25}]
    assert network.training
    assert depth(network, "feature_maps") == 2
    output = FeatureTap(network, ["feature_maps[1]", "pooled"])({"pixel_values": torch.randn(2, 1, 8, 8)})
    assert output.logits.shape == (2, 5)
    assert output.features["feature_maps[1]"].shape == (2, 6, 4, 4)
    again = timm_model(**network.arguments)  # type: ignore[arg-type]
    again.load_state_dict(network.state_dict())
    assert stand_in[0] == stand_in[1]


def test_a_tagged_name(stand_in: list[dict[str, Any]]) -> None:
    timm_model("resnet18.a1_in1k", 5)
    assert stand_in[0]["name"] == "resnet18.a1_in1k"


@pytest.mark.usefixtures("stand_in")
def test_what_timm_cannot_build() -> None:
    with pytest.raises(ConfigError, match=r"name='resnet81' is not .* timm 1.0; did you mean 'resnet18'"):
        timm_model("resnet81", 5)
    with pytest.raises(ConfigError, match=r"name='zzz' is not .* timm 1.0$"):
        timm_model("zzz", 5)
    with pytest.raises(ConfigError, match=r"name='resnet18', channels=3, pretrained=True: no connection"):
        timm_model("resnet18", 5, pretrained=True)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"name=resnet18 needs timm.*kd-lightning\[vision\]"):
        timm_model("resnet18", 5)
