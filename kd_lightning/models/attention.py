"""Eager attention for `transformers` networks that returns probabilities from before dropout.

In training, eager attention of `transformers` returns probabilities after dropout, whose rows do not sum to 1. Losses
on attentions compare distributions.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from kd_lightning.runtime.errors import ConfigError

PROBABILITIES = "kd_probabilities"
"""Its name among the attention implementations of `transformers`."""


def give_probabilities(encoder: Any) -> None:
    """Switch a Hugging Face network to this attention, in place.

    Args:
        encoder: The network, a `PreTrainedModel`.

    Raises:
        ConfigError: Its attention returns no probabilities and cannot be switched.
    """
    register_attention()
    encoder.set_attn_implementation(PROBABILITIES)
    if encoder.config._attn_implementation not in (PROBABILITIES, "eager"):
        raise ConfigError(
            f"attention[i]: {type(encoder).__name__} uses {encoder.config._attn_implementation} attention, which has "
            "no probabilities, and cannot be switched: build the network with attn_implementation=eager"
        )


def register_attention() -> None:
    """Register this attention with `transformers`, which is imported here."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBABILITIES, _attend)
    masks = AttentionMaskInterface()  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(PROBABILITIES, masks["eager"])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, **more: Any
) -> tuple[Tensor, Tensor]:
    """Compute eager attention, but return the probabilities from before dropout."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    eager = next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
    output, probabilities = eager(module, query, key, value, mask, dropout=0.0, **more)
    if dropout > 0.0:
        output, _ = eager(module, query, key, value, mask, dropout=dropout, **more)
    return output, probabilities
