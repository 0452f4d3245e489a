"""Argument checks that our own networks share."""

from __future__ import annotations

from kd_lightning.runtime.errors import ConfigError


def check_sizes(dropout: float = 0.0, **sizes: int) -> None:
    """Raise `ConfigError` for a size below 1 or a dropout outside [0, 1)."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size} is too small: give a whole number of at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout} is not a probability: give a number from 0 to below 1")


def check_heads(num_heads: int, hidden_size: int) -> None:
    """Raise `ConfigError` for heads that do not divide the width."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError(f"num_heads={num_heads} does not divide hidden_size={hidden_size}: choose a divisor")


def check_padding(pad_token_id: int, vocab_size: int) -> None:
    """Raise `ConfigError` for a padding id that is not a token of the vocabulary."""
    if not 0 <= pad_token_id < vocab_size:
        raise ConfigError(f"pad_token_id={pad_token_id} is not a token: give a number from 0 to {vocab_size - 1}")
