"""Continues texts with a causal language model, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kd_lightning.models.adapt import evaluating
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.hf import quiet_loading

VERSION = 1
"""Goes up when a model continues a text otherwise with the same seed."""


def continuations(
    model: CausalLM, prompts: Sequence[Tensor], new_tokens: int, ends: Sequence[int], temperature: float, seed: int,
    top_p: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Return what a language model draws after each text, one token after the other.

    In eval mode (no dropout) and without a graph, with the model's cache of keys and values. Neither the modes of its
    modules nor the random numbers of others change.

    Args:
        model: The model.
        prompts: Token ids, `(L,)` each, one or more.
        new_tokens: The most tokens drawn after a text.
        ends: The tokens that end a text; the one that does is part of what is returned.
        temperature: Tokens are drawn from `softmax(logits / temperature)`; 0 takes the likeliest.
        seed: Of the draw: the same texts with the same seed are continued alike.
        top_p: Tokens are drawn from the likeliest ones that have so much of the mass together (Holtzman et al. 2019,
            arXiv 1904.09751); 1: from all.

    Returns:
        The drawn token ids, one or more a text, on the device of the texts.
    """
    network: Any = model.network
    device, width = network.device, max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    rows = network.get_input_embeddings().num_embeddings
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens, eos_token_id=list(ends) or None, pad_token_id=0, use_cache=True,
        suppress_tokens=list(range(model.vocab_size, rows)) or None,  # rows that no token has
        **(sampling if temperature else {"do_sample": False}),
    )  # fmt: skip
    cuda = [device] if device.type == "cuda" else []
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=cuda), quiet_loading(hide_bar=False):
        torch.manual_seed(seed)
        whole = network.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
    found = []
    for row in whole[:, width:].to(prompts[0].device):
        ended = torch.isin(row, torch.tensor(list(ends), device=row.device)).nonzero()
        found.append(row[: int(ended[0]) + 1] if len(ended) else row)  # by the first end: padding may be one too
    return found
