"""A masked language model out of its teacher: some of its layers, at its width or a smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kd_lightning.models.adapt import unwrap
from kd_lightning.models.fits import check_block
from kd_lightning.models.from_teacher import chosen_layers, copy_weights, student_config
from kd_lightning.models.hf import layer_stack
from kd_lightning.models.initialise import Initialise, check_initialise
from kd_lightning.models.masked_lm import MaskedLM
from kd_lightning.models.narrow import important, narrow_config
from kd_lightning.models.rebuild import fresh_network
from kd_lightning.runtime.errors import ConfigError


def masked_lm_from_teacher(
    teacher: nn.Module,
    vocab_size: int,
    block_size: int | None = None,
    layers: int | float | Sequence[int] = 2,
    width: int | None = None,
    initialise: Initialise = "teacher",
) -> MaskedLM:
    """Build a student of the teacher's class from some of its layers, with its embeddings and head.

    Args:
        teacher: A `MaskedLM`.
        vocab_size: Tokens of the tokenizer, which is the teacher's.
        block_size: Tokens of a block.
        layers: Which of the teacher's layers, as for `kd_lightning.models.from_teacher.from_teacher`.
        width: Make a BERT so much narrower, as there; None: as wide as it is.
        initialise: `teacher`: with the teacher's weights; `random`: the same architecture with fresh ones.

    Raises:
        ConfigError: Another teacher, layers that it does not have, blocks longer than its positions, or a width that it
            cannot have.
    """
    check_initialise(initialise)
    teacher = unwrap(teacher)
    if not isinstance(teacher, MaskedLM):
        raise ConfigError(
            f"the teacher {type(teacher).__name__} is no masked language model of transformers: use another student, "
            "such as model@student=masked_lm_small"
        )
    source: PreTrainedModel = teacher.network
    check_block(source, block_size, "the teacher")
    stack, chosen = layer_stack(source), chosen_layers(layers, source.config.num_hidden_layers)
    config, cut = student_config(source.config, chosen, int(source.config.num_labels or 0)), None
    if width is not None:
        narrow_config(config, width)
        embedding: Any = source.get_input_embeddings()
        cut = important(source.state_dict(), embedding.weight.detach(), source.config, config, chosen)
    network = fresh_network(type(source), config, config._attn_implementation)
    if initialise == "teacher":
        copy_weights(network, source, {f"{stack}.{new}.": f"{stack}.{old}." for new, old in enumerate(chosen)}, cut=cut)
    return MaskedLM(network, vocab_size).train()
