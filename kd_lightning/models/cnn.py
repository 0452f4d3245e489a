"""Small convolutional classifiers for small images: a plain one, and CIFAR's residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.sizes import check_sizes
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import ModelOutput


class CNN(nn.Module):
    """Stages of 3x3 convolutions with BatchNorm and ReLU, global average pooling, linear classifier.

    Each stage but the first halves height and width in its first convolution. With the default widths and one
    convolution in each stage it has 24 thousand parameters for images of 3 channels and 10 classes.

    Initialisation: He normal (fan out) for the convolutions, N(0, 0.01^2) and zero for the classifier.

    Features (see `models.features`): `feature_maps[i]`, the output of stage i; `pooled`, before dropout.

    Args:
        num_classes: Number of classes C.
        channels: Channels of an image: 1 or 3.
        widths: Channels of each stage.
        convolutions: Convolutions in each stage.
        dropout: Probability of dropping an entry of the pooled vector.

    Raises:
        ConfigError: A size below 1, no stage, or a dropout outside [0, 1).
    """

    VERSION = 1

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        convolutions: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = list(widths)
        self.arguments: dict[str, Any] = {
            "num_classes": num_classes,
            "channels": channels,
            "widths": widths,
            "convolutions": convolutions,
            "dropout": dropout,
        }
        check_sizes(
            dropout, num_classes=num_classes, channels=channels, convolutions=convolutions, widths=min(widths or [0])
        )
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            layers: list[nn.Module] = []
            for j in range(convolutions):
                stride = 2 if i > 0 and j == 0 else 1
                layers += [_convolution(channels, width, stride), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.stages.append(nn.Sequential(*layers))
        self.feature_names = _stage_names(self.stages, str(3 * convolutions - 2))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        """Classify images `(B, channels, H, W)`: logits `(B, C)`."""
        maps = pixel_values
        for stage in self.stages:
            maps = stage(maps)
        return ModelOutput(self.classifier(self.dropout(maps.mean((2, 3)))))


class ResNet(nn.Module):
    """The residual network for 32x32 images of He et al. 2015 (arXiv 1512.03385, section 4.2).

    A 3x3 convolution, three stages of n = (depth - 2) / 6 blocks of two 3x3 convolutions, with 16, 32 and 64 channels
    times `width`, global average pooling and a linear classifier. Stages 2 and 3 halve height and width. Shortcuts have
    no parameters: where the shape changes, every second pixel, and zeros for the new channels (option A of the paper).
    With `depth=20` and 10 classes 270 thousand parameters. Images of 28x28 do as well.

    Initialisation: as `CNN`.

    Features (see `models.features`): `feature_maps[0..2]`, the outputs of the stages, after ReLU; `pooled`.

    Args:
        num_classes: Number of classes C.
        channels: Channels of an image: 1 or 3.
        depth: 6n + 2, the number of layers with weights: 8, 14, 20, 26, 32, 38, 44, 50, 56, ...
        width: Factor on the number of channels of every layer.

    Raises:
        ConfigError: A size below 1, another depth, or a width that leaves no channel.
    """

    VERSION = 1

    def __init__(self, num_classes: int, channels: int = 3, depth: int = 20, width: float = 1.0) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "num_classes": num_classes,
            "channels": channels,
            "depth": depth,
            "width": width,
        }
        if depth < 8 or (depth - 2) % 6:
            near = 6 * max(round((depth - 2) / 6), 1) + 2
            raise ConfigError(f"depth={depth} is not 6n + 2 (8, 14, 20, 26, ...): the nearest is {near}")
        widths = [round(base * width) for base in (16, 32, 64)]
        if widths[0] < 1:
            raise ConfigError(f"width={width} leaves none of the first stage's 16 channels: give a larger factor")
        check_sizes(num_classes=num_classes, channels=channels)
        self.stem = _unit(channels, widths[0])
        self.stages = nn.ModuleList()
        before = widths[0]
        for i, after in enumerate(widths):
            blocks = [
                _Block(before if j == 0 else after, after, 2 if i and j == 0 else 1) for j in range((depth - 2) // 6)
            ]
            self.stages.append(nn.Sequential(*blocks))
            before = after
        self.feature_names = _stage_names(self.stages, f"{(depth - 2) // 6 - 1}.sum")
        self.classifier = nn.Linear(before, num_classes)
        _initialise(self)

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        """Classify images `(B, channels, H, W)`: logits `(B, C)`."""
        maps = F.relu(self.stem(pixel_values))
        for stage in self.stages:
            maps = stage(maps)
        return ModelOutput(self.classifier(maps.mean((2, 3))))


class _Block(nn.Module):
    """Two convolutions and a shortcut without parameters around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _unit(before, after, stride), _unit(after, after)
        self.stride, self.new_channels = stride, after - before
        self.sum = nn.Identity()  # lets hooks capture the maps from before the last ReLU

    def forward(self, maps: Tensor) -> Tensor:
        """Return `(B, after, H / stride, W / stride)`."""
        shortcut = maps[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(self.sum(self.second(F.relu(self.first(maps))) + shortcut))


def _convolution(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)  # BatchNorm has the bias


def _unit(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_convolution(before, after, stride), nn.BatchNorm2d(after))


def _stage_names(stages: nn.ModuleList, before_relu: str) -> dict[str, str]:
    names = {f"feature_maps[{i}]": f"stages.{i}" for i in range(len(stages))}
    return names | {f"preactivations[{i}]": f"stages.{i}.{before_relu}" for i in range(len(stages))}


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
