"""Loads pretrained language models of Hugging Face for the tokens and blocks of some data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from kd_lightning.models.fits import check_block
from kd_lightning.models.hf import cannot_load, check_attention, locate, quiet_loading, read_config
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import MOST_PADDING_ROWS


def pretrained_lm(
    auto: Any, kind: str, name: str, vocab_size: int, block_size: int | None, attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, list[str]]:  # fmt: skip
    """Load a language model in float32, and the names of its head's weights that the checkpoint lacks.

    Args:
        auto: Which auto class of `transformers` has it.
        kind: What it is, for messages.
        name: A folder saved by `save_pretrained`, an asset, or a name on the Hugging Face hub.
        vocab_size: Tokens of the data's tokenizer, which must be the model's own.
        block_size: Tokens of a block; None: of any number.
        attn_implementation: `sdpa`, `eager`, ...; None: sdpa.
        trust_remote_code: Run the Python files that the checkpoint brings.

    Raises:
        ConfigError: No such folder or name, none of this kind, one that lacks weights of its layers, another vocabulary
            than the data's, or blocks that are longer than it has positions.
    """
    check_attention(attn_implementation, "attn_implementation")
    source, local = locate(name)
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with quiet_loading(hide_bar=local):
            read_config(source, name, options)  # refuses what it may not name
            network, found = auto.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, **options, **more
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(cannot_load(name, kind, local, error)) from error
    missing = sorted(found["missing_keys"])
    check_whole(name, [one for one in missing if one.startswith(f"{network.base_model_prefix}.")])
    rows = int(network.get_input_embeddings().num_embeddings)
    if not vocab_size <= rows <= vocab_size + MOST_PADDING_ROWS:
        raise ConfigError(
            f"name={name!r} has embeddings for {rows} tokens and the data's tokenizer has {vocab_size}: read with the "
            f"checkpoint's own tokenizer, data.tokenizer={name}"
        )
    check_block(network, block_size, name)
    return network, missing


def check_whole(name: str, missing: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks weights.

    Raises:
        ConfigError: It would predict with random numbers in their place.
    """
    if missing:
        raise ConfigError(
            f"name={name!r} lacks {len(missing)} of its weights, such as {missing[0]}: save or fetch it again"
        )
