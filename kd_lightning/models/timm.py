"""Image classifiers of the timm library, by name."""

from __future__ import annotations

from torch import nn

from kd_lightning.runtime.errors import ConfigError, did_you_mean


def timm_model(
    name: str, num_classes: int, channels: int = 3, pretrained: bool = False, drop_rate: float = 0.0
) -> nn.Module:
    """Build a timm classifier in training mode.

    Its `feature_maps[i]` are the outputs of the modules in its `feature_info` (see `kd_lightning.models.features`).

    Args:
        name: The model's name in timm, such as `resnet18` or `vit_tiny_patch16_224`.
        num_classes: Number of classes; a pretrained network with another number gets a new head.
        channels: Channels of an image; pretrained weights of the first layer are summed or repeated to fit.
        pretrained: Load pretrained weights: a download from the Hugging Face hub, unless they are in its cache.
        drop_rate: Dropout before the classifier.

    Raises:
        ConfigError: timm cannot be imported, has no such model, or the weights cannot be loaded.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter with a torch of another build
        raise ConfigError(
            f"name={name} needs timm and a matching torchvision: install kd-lightning[vision], and torchvision "
            f"from the index that torch came from ({error})"
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        raise ConfigError(
            f"name={name!r} is not a model of timm {timm.__version__}{_nearest(name, timm.list_models())}"
        )
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, drop_rate=drop_rate
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"name={name!r}, channels={channels}, pretrained={pretrained}: {error}") from error
    # Stored in a run folder to rebuild it; the weights come from there.
    arguments = {"name": name, "num_classes": num_classes, "channels": channels, "drop_rate": drop_rate}
    network.arguments = arguments  # type: ignore[assignment]
    return network.train()


def _nearest(name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names)
    return "" if hint.startswith("; valid") else hint  # the list has a thousand names
