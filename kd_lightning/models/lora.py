"""Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685), through `peft`."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kd_lightning.models.adapt import unwrap
from kd_lightning.runtime.errors import ConfigError

ALL_LINEAR = "all-linear"
"""Every linear layer but the output layer."""


@dataclass(frozen=True)
class Lora:
    """Adapters: `W x + alpha / r * B A x` in place of `W x`, at first A is random and B zero.

    Attributes:
        r: Rank: rows of A and columns of B.
        alpha: Their scale, times r.
        dropout: Probability of dropping an entry of x on its way to A.
        targets: Names of the linear layers that have some, such as `[q_proj, v_proj]`, or `all-linear`.

    Raises:
        ConfigError: A value out of its range.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r={self.r}: give a rank of at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha:g}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout:g}: give a probability below 1")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ConfigError(f"targets={self.targets!r}: give a list of layers' names, or {ALL_LINEAR}")
        if not self.targets:
            raise ConfigError(f"targets is empty: give a list of layers' names, or {ALL_LINEAR}")


def add_adapters(network: PreTrainedModel, lora: Lora) -> None:
    """Add fresh adapters to a network in place, and freeze everything else.

    Raises:
        ConfigError: `peft` is not installed, or the targets are no linear layers of the network.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("adapters need peft: pip install 'kd-lightning[lm]'")
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM",
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in network.modules()),
    )  # fmt: skip
    linear = sorted({name.rpartition(".")[2] for name, layer in network.named_modules() if _is_linear(layer)})
    known = f"targets={targets}: {type(network).__name__} has the linear layers {', '.join(linear)}"
    try:
        inject_adapter_in_model(config, network)
    except ValueError as error:  # nothing of these names, or what peft cannot adapt
        raise ConfigError(known) from error
    if not all(_is_linear(layer.get_base_layer()) for _, layer in adapted(network)):
        raise ConfigError(known)
    if any(layer is network.get_output_embeddings() for _, layer in adapted(network)):  # type: ignore[no-untyped-call]
        raise ConfigError(f"targets={targets}: the output layer cannot have adapters: leave it out")


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | Conv1D)


def adapted(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return the layers with adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer))


def merged(network: nn.Module) -> nn.Module:
    """Return a copy of a network with its adapters merged into its weights; a network without any itself."""
    if getattr(unwrap(network), "lora", None) is None:
        return network
    whole: Any = copy.deepcopy(unwrap(network))
    for name, layer in list(adapted(whole)):
        layer.merge()
        whole.set_submodule(name, layer.get_base_layer())
    whole.lora = None
    return whole  # type: ignore[no-any-return]
