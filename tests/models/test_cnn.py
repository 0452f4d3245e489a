from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.models.cnn import CNN, ResNet
from kd_lightning.models.size import count_parameters
from kd_lightning.runtime.errors import ConfigError

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "cnn": lambda channels: CNN(5, channels, widths=(4, 6), convolutions=2, dropout=0.5),
    "resnet": lambda channels: ResNet(5, channels, depth=14, width=0.5),
}


def images(channels: int = 3, size: int = 32, batch: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, size, size)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_gradients(name: str, size: int, channels: int) -> None:
    network = NETWORKS[name](channels)
    logits = run_network(network, {"pixel_values": images(channels, size), "labels": torch.zeros(4)}).logits
    assert logits.shape == (4, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_sizes() -> None:
    assert count_parameters(CNN(10)).total == 24346
    assert count_parameters(CNN(10, channels=1, widths=(16, 32, 48), convolutions=2)).total < 60_000
    assert count_parameters(ResNet(10)).total == 269_722  # 0.27M in the paper's table 6
    assert count_parameters(ResNet(10, depth=56)).total == 853_018  # 0.85M
    assert count_parameters(ResNet(10, depth=110)).total == 1_727_962  # 1.7M


def test_stages_halve_the_maps() -> None:
    cnn, resnet = CNN(3, widths=(2, 3, 4), convolutions=2), ResNet(3, depth=8, width=0.25)
    maps = images()
    for i, stage in enumerate(cnn.stages):
        maps = stage(maps)
        assert maps.shape == (4, i + 2, 32 >> i, 32 >> i)
    maps = resnet.stem(images())
    for i, stage in enumerate(resnet.stages):
        maps = stage(maps)
        assert maps.shape == (4, 4 << i, 32 >> i, 32 >> i)


def test_a_block_is_its_two_convolutions_and_the_shortcut() -> None:
    """The paper's equations 1 and 2 with option A, written without the network's own forward."""
    torch.manual_seed(0)
    network = ResNet(3, depth=8, width=0.25).double().eval()
    block = network.stages[1][0]  # 4 channels at 8x8 become 8 at 4x4
    for unit in (block.first, block.second):
        unit[1].running_mean.normal_()
        unit[1].running_var.uniform_(0.5, 2.0)
        nn.init.normal_(unit[1].weight)
        nn.init.normal_(unit[1].bias)
    maps = images(4, 8, 2).double()

    def unit(x: Tensor, sequence: nn.Sequential, stride: int) -> Tensor:
        convolution, norm = sequence
        x = torch.conv2d(x, convolution.weight, stride=stride, padding=1)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    expected = unit(unit(maps, block.first, 2).clamp(min=0), block.second, 1)
    expected[:, :4] += maps[:, :, ::2, ::2]
    torch.testing.assert_close(block(maps), expected.clamp(min=0))
    before = maps.clone()
    block(maps)
    assert torch.equal(maps, before)  # nothing is changed in place, so that features stay what they were


def test_initialisation_is_what_the_docstring_says() -> None:
    torch.manual_seed(0)
    for network in (CNN(40, widths=(32, 64)), ResNet(40, depth=8)):
        for convolution in (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3):
            std = math.sqrt(2 / (9 * convolution.out_channels))
            assert convolution.weight.std().item() == pytest.approx(std, rel=0.05)
        assert network.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not network.classifier.bias.any()


@pytest.mark.parametrize("name", NETWORKS)
def test_built_again_from_its_arguments_and_weights(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name](3)
    network(images())  # BatchNorm has seen something
    network.eval()
    arguments = json.loads(json.dumps(network.arguments))
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    rebuilt = type(network)(**arguments)
    assert rebuilt.training
    assert rebuilt.arguments == network.arguments
    rebuilt.load_state_dict(load_file(tmp_path / "network.safetensors"))
    assert torch.equal(rebuilt.eval()(images()).logits, network(images()).logits)


def test_it_learns() -> None:
    for network in (CNN(2, 1, widths=(4, 8)), ResNet(2, 1, depth=8, width=0.25)):
        torch.manual_seed(0)
        labels = torch.arange(32) % 2
        pictures = torch.randn(32, 1, 8, 8) + labels.view(-1, 1, 1, 1) * torch.eye(8)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(40):
            loss = nn.functional.cross_entropy(network(pictures).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.5  # it begins at log 2 = 0.69


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: CNN(0), "num_classes=0 is too small"),
        (lambda: CNN(2, widths=()), "widths=0 is too small"),
        (lambda: CNN(2, widths=(4, 0)), "widths=0 is too small"),
        (lambda: CNN(2, convolutions=0), "convolutions=0 is too small"),
        (lambda: CNN(2, dropout=1.0), "dropout=1.0 is not a probability"),
        (lambda: ResNet(2, channels=0), "channels=0 is too small"),
        (lambda: ResNet(2, depth=18), r"depth=18 is not 6n \+ 2 .*nearest is 20"),
        (lambda: ResNet(2, depth=2), "nearest is 8"),
        (lambda: ResNet(2, width=0.01), "width=0.01 leaves none of the first stage's 16 channels"),
    ],
)
def test_wrong_arguments(build: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build()
