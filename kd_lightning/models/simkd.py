"""Students that predict with their teacher's classifier (SimKD, Chen et al. 2022, arXiv 2203.14001)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network, unwrap
from kd_lightning.models.initialise import Initialise, check_initialise
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import ModelOutput


class SimKDStudent(nn.Module):
    """A backbone, a projector, and a classifier with the teacher's input.

    The backbone's own classifier (its last linear layer) is removed; its input goes through the projector, two linear
    layers with a ReLU between them, to the new classifier. `kd_lightning.losses.simkd` compares the projector's output,
    the feature `simkd_projector` (or `pooled`), with the teacher's `pooled`.

    Args:
        backbone: A classifier of `num_classes` or any other number of classes; changed in place.
        width: Of the input of the teacher's classifier.
        num_classes: Number of classes C.
        hidden_size: Width inside the projector.
        frozen: Whether the classifier is the teacher's and not trained.

    Raises:
        ConfigError: A backbone without a linear layer.
    """

    VERSION = 1

    def __init__(
        self, backbone: nn.Module, width: int, num_classes: int, hidden_size: int = 256, frozen: bool = True
    ) -> None:
        super().__init__()
        self.arguments = {"width": width, "num_classes": num_classes, "hidden_size": hidden_size, "frozen": frozen}
        name, head = last_linear(backbone)
        if not name:
            raise ConfigError("backbone is a single linear layer: nothing is left below its classifier")
        backbone.set_submodule(name, nn.Identity())
        self.backbone = backbone
        self.simkd_projector = nn.Sequential(
            nn.Linear(head.in_features, hidden_size), nn.ReLU(), nn.Linear(hidden_size, width)
        )
        self.classifier = nn.Linear(width, num_classes)
        self.classifier.requires_grad_(not frozen)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> ModelOutput:
        """Classify a batch of what the backbone takes: logits `(B, C)`."""
        entries = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }  # fmt: skip
        read = run_network(self.backbone, {name: value for name, value in entries.items() if value is not None}).logits
        return ModelOutput(self.classifier(self.simkd_projector(read)))


def simkd(
    teacher: nn.Module,
    num_classes: int,
    backbone: Callable[..., nn.Module],
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
    channels: int | None = None,
    hidden_size: int = 256,
    initialise: Initialise = "teacher",
) -> SimKDStudent:
    """Build a student that predicts with a copy of its teacher's classifier.

    Args:
        teacher: Any classifier whose logits come from its last linear layer.
        num_classes: Number of classes, the teacher's too.
        backbone: Makes the student below the projector; given those of `num_classes`, `vocab_size`, `pad_token_id` and
            `channels` that it takes.
        vocab_size: Number of token ids, for texts.
        pad_token_id: The padding id, for texts.
        channels: Of an image.
        hidden_size: Width inside the projector.
        initialise: `teacher`: with the teacher's classifier, which is not trained; `random`: the same network with a
            fresh classifier that is.

    Raises:
        ConfigError: A teacher without such a classifier, or one for another number of classes.
    """
    check_initialise(initialise)
    name, head = last_linear(teacher)
    if head.out_features != num_classes:
        raise ConfigError(
            f"the teacher's last linear layer, {name}, has {head.out_features} outputs and the data have "
            f"{num_classes} classes: a SimKD student needs a teacher of the same classes"
        )
    sizes: dict[str, Any] = {
        "num_classes": num_classes, "vocab_size": vocab_size, "pad_token_id": pad_token_id, "channels": channels,
    }  # fmt: skip
    takes = inspect.signature(backbone).parameters
    network = backbone(**{key: value for key, value in sizes.items() if key in takes and value is not None})
    student = SimKDStudent(network, head.in_features, num_classes, hidden_size, frozen=initialise == "teacher")
    if initialise == "teacher":
        with torch.no_grad():
            student.classifier.weight.copy_(head.weight)
            student.classifier.bias.copy_(torch.zeros(num_classes) if head.bias is None else head.bias)
    return student


def last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    """Return a network's last linear layer, which outputs its logits, with its name.

    Raises:
        ConfigError: It has none.
    """
    linear = [(name, module) for name, module in unwrap(network).named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"{type(unwrap(network)).__name__} has no linear layer that could be its classifier")
    return linear[-1]
