"""A causal language model out of its teacher: some of its layers, or its embeddings at another width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from kd_lightning.models.adapt import unwrap
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.embedding import principal_components
from kd_lightning.models.fits import check_block
from kd_lightning.models.from_teacher import chosen_layers, copy_weights, student_config
from kd_lightning.models.hf import layer_stack
from kd_lightning.models.initialise import Initialise, check_initialise
from kd_lightning.models.rebuild import fresh_network
from kd_lightning.runtime.errors import ConfigError


def causal_lm_from_teacher(
    teacher: nn.Module,
    vocab_size: int,
    block_size: int | None = None,
    layers: int | float | Sequence[int] = 4,
    width: int | None = None,
    initialise: Initialise = "teacher",
    logits_in_training: bool = True,
) -> CausalLM:
    """Build a student of the teacher's class from what of it fits.

    As wide as the teacher, it has the teacher's embeddings, output layer, final normalisation and the chosen layers.
    Layers that others stood between predict worse than random ones at first: `distillation=hidden_then_logits` trains
    them to the teacher's hidden states before its predictions. At another width embeddings and output layer are the
    leading principal components of the teacher's, and the layers are fresh.

    Args:
        teacher: A `CausalLM`.
        vocab_size: Tokens of the tokenizer, which is the teacher's.
        block_size: Tokens of a block.
        layers: Which of the teacher's layers, as for `kd_lightning.models.from_teacher.from_teacher`.
        width: Of the hidden states, below the teacher's. Heads are as large as the teacher's or the next smaller even
            size that divides it, and share keys and values as the teacher's do where their number allows.
        initialise: `teacher`: as described; `random`: the same architecture with fresh weights.
        logits_in_training: As for `CausalLM`.

    Raises:
        ConfigError: Another teacher, layers that it does not have, blocks longer than its positions, or a width that it
            cannot have.
    """
    check_initialise(initialise)
    teacher = unwrap(teacher)
    if not isinstance(teacher, CausalLM):
        raise ConfigError(
            f"the teacher {type(teacher).__name__} is no causal language model of transformers: use another student, "
            "such as model@student=causal_lm_small"
        )
    source = teacher.network
    chosen = chosen_layers(layers, source.config.num_hidden_layers)
    config = student_config(source.config, chosen, int(source.config.num_labels or 0))
    check_block(source, block_size, "the teacher")
    if width is not None:
        narrow(config, width)
    network = fresh_network(type(source), config, config._attn_implementation)
    if initialise == "teacher" and width is None:
        stack = layer_stack(source)
        copy_weights(network, source, {f"{stack}.{new}.": f"{stack}.{old}." for new, old in enumerate(chosen)})
    elif initialise == "teacher":
        _reduce(network, source)
    return CausalLM(network, vocab_size, logits_in_training).train()


def narrow(config: PreTrainedConfig, width: int) -> None:
    """Set the sizes of a Llama-like configuration to another width.

    Raises:
        ConfigError: It is no such configuration, or the width is odd or not below its own.
    """
    heads, groups, old = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if not (heads and groups and old and getattr(config, "intermediate_size", None)):
        raise ConfigError(
            f"width={width}: only models of Llama's kind can be made narrower, not {config.model_type}; set width=null"
        )
    if width % 2 or not 2 <= width < old:
        raise ConfigError(f"width={width}: the teacher is {old} wide; give a smaller even number")
    size = getattr(config, "head_dim", None) or old // heads
    size = next(one for one in range(min(size, width) // 2 * 2, 0, -2) if width % one == 0)
    shared = heads // groups
    config.intermediate_size = max(round(config.intermediate_size * width / old / 8) * 8, 8)
    config.hidden_size, config.num_attention_heads = width, width // size
    config.num_key_value_heads = width // size // shared if width // size % shared == 0 else width // size
    if getattr(config, "head_dim", None):
        config.head_dim = size


@torch.no_grad()
def _reduce(network: Any, source: Any) -> None:
    """Fill embeddings and output layer with the teacher's principal components, as large as fresh ones."""
    for of in ("get_input_embeddings", "get_output_embeddings"):
        fresh, table = getattr(network, of)().weight, getattr(source, of)().weight
        if of == "get_output_embeddings" and fresh is network.get_input_embeddings().weight:
            return
        fresh.copy_(principal_components(table, fresh.shape[1], float(fresh.square().mean().sqrt())))
