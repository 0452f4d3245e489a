"""Checks, before training, that a network can process and learn from its batches."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from kd_lightning.models.adapt import run_network
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch

_POSITIONS = ("position_embeddings", "position_embedding", "wpe", "embed_positions")
"""Names of position tables in `transformers`."""


def check_length(network: nn.Module, max_length: int | None, owner: str) -> None:
    """Refuse inputs that are longer than a network has positions.

    Args:
        network: Any network; those without a table of positions accept any length.
        max_length: The longest input in tokens; None where there are no tokens.
        owner: Whose network it is.

    Raises:
        ConfigError: The table is too short.
    """
    limit = most_positions(network)
    if max_length is not None and limit is not None and max_length > limit:
        raise ConfigError(
            f"data.max_length={max_length}: the {owner} has positions for at most {limit} tokens; set "
            f"data.max_length={limit} or lower"
        )


def check_block(network: PreTrainedModel, block_size: int | None, owner: str) -> None:
    """Refuse blocks longer than a language model has positions.

    Args:
        network: The model.
        block_size: Tokens of a block; None: of any number.
        owner: Whose it is, or its name.

    Raises:
        ConfigError: Names both.
    """
    limit = text_positions(network)
    if block_size is not None and limit is not None and block_size > limit:
        raise ConfigError(f"data.block_size={block_size}: {owner} has positions for {limit} tokens; set it lower")


def text_positions(network: PreTrainedModel) -> int | None:
    """Return how many tokens a language model has positions for, by its table and configuration."""
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    return min((count for count in (longest, most_positions(network)) if count is not None), default=None)


def most_positions(network: nn.Module) -> int | None:
    """Return the number of tokens in a network's shortest position table; None without one."""
    tables = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    return min((_usable(table) for table in tables), default=None)


def _usable(table: nn.Embedding) -> int:
    """Return how many entries of a table are positions (RoBERTa and BART begin at an offset)."""
    offset = getattr(table, "offset", 0)
    if not offset and table.padding_idx is not None:
        offset = table.padding_idx + 1
    return table.num_embeddings - int(offset)


def check_single(network: nn.Module, batch: Batch, smallest: int, batch_size: int, key: str) -> None:
    """Refuse batches of one example for a network with a BatchNorm.

    Args:
        network: Any network; it stays as it is.
        batch: Some examples.
        smallest: Examples in the smallest batch it will be trained on.
        batch_size: Examples in the others.
        key: The key that sets `batch_size`.

    Raises:
        ConfigError: It cannot be trained on that batch.
    """
    if smallest > 1 or not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return
    one = {name: entry[:1] for name, entry in batch.items()}
    with torch.random.fork_rng(), torch.no_grad():
        try:
            run_network(copy.deepcopy(network).train(), one)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"{key}={batch_size}: a batch is a single example, from which a BatchNorm learns nothing; "
                f"set {key} to 3 or more (of 2 training examples or more)"
            ) from error
