"""Masked language models of Hugging Face: pretrained, or small and new."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, PreTrainedModel

from kd_lightning.models.adapt import at_places
from kd_lightning.models.pretrained_lm import pretrained_lm
from kd_lightning.models.sizes import check_heads, check_sizes
from kd_lightning.types import ModelOutput

log = logging.getLogger(__name__)

DISTILBERT = ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")
"""Its head, in another order than it registers the modules."""


class MaskedLM(nn.Module):
    """A masked language model of `transformers`, whose head reads the masked tokens alone.

    Of an architecture whose head is not a run of its modules all logits are computed, and those of the masked tokens
    taken. Logits are without the rows by which an embedding is larger than the vocabulary.

    Args:
        network: Any `AutoModelForMaskedLM`.
        vocab_size: V, tokens of the tokenizer.

    Attributes:
        fresh_head: Whether nothing was learned by its head yet, so that its predictions are no better than chance.
    """

    VERSION = 1
    """Goes up when it predicts something else with the same weights."""

    def __init__(self, network: PreTrainedModel, vocab_size: int) -> None:
        super().__init__()
        self.network, self.vocab_size = network, vocab_size
        self._head = _head(network)
        self.fresh_head = False

    @property
    def arguments(self) -> dict[str, Any]:
        """What builds it again, beside the network."""
        return {"vocab_size": self.vocab_size}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, masked_places: Tensor | None = None
    ) -> ModelOutput:
        """Predict the token at each masked place: logits `(B, M, V)`; without any, at each: `(B, L, V)`.

        Args:
            input_ids: `(B, L)`.
            attention_mask: `(B, L)`, 0 at padding.
            masked_places: `(B, M)`.
        """
        if masked_places is None or not self._head:
            logits = self.network(input_ids, attention_mask=attention_mask).logits[..., : self.vocab_size]
            return ModelOutput(logits if masked_places is None else at_places(logits, masked_places))
        states = self.network.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
        return ModelOutput(_through(self.network, self._head, at_places(states, masked_places))[..., : self.vocab_size])


def _through(network: nn.Module, modules: Sequence[str], states: Tensor) -> Tensor:
    for name in modules:
        states = network.get_submodule(name)(states)
    return states


@torch.no_grad()
def _head(network: PreTrainedModel) -> tuple[str, ...]:
    """Return the modules that turn hidden states into logits, in line; none where these are not all."""
    probe: Any = copy.deepcopy(network)  # some change with what they read: BigBird's attention by the length
    probe.eval()
    own = tuple(name for name, module in probe.named_children() if module is not probe.base_model)
    ids = torch.tensor([[1, 2]], device=probe.device)
    expected, states = probe(ids).logits, probe.base_model(ids).last_hidden_state
    for names in (own, DISTILBERT):
        try:
            found = _through(probe, names, states)
        except (AttributeError, TypeError, RuntimeError):  # not its modules, or one of other inputs, as a loss
            continue
        alike = isinstance(found, Tensor) and found.shape == expected.shape  # XLM's head returns a tuple
        if alike and torch.allclose(found, expected, atol=1e-5):
            return names
    return ()


def masked_lm(
    name: str,
    vocab_size: int,
    block_size: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> MaskedLM:
    """Load a pretrained masked language model, in float32 and training mode.

    An encoder without such a head gets a fresh one, whose output layer is the embedding; this is logged, and
    `fresh_head` of the model is True.

    Args:
        name: The asset `minilm`, a folder saved by `save_pretrained`, or a name on the Hugging Face hub.
        vocab_size: Tokens of the data's tokenizer, which must be the model's own.
        block_size: Tokens of a block.
        attn_implementation: `sdpa`, `eager`, ...; None: sdpa.
        trust_remote_code: Run the Python files that the checkpoint brings.

    Raises:
        ConfigError: As `kd_lightning.models.pretrained_lm.pretrained_lm`.
    """
    network, missing = pretrained_lm(
        AutoModelForMaskedLM, "a masked language model", name, vocab_size, block_size, attn_implementation,
        trust_remote_code,
    )  # fmt: skip
    if missing:
        log.warning("%s: no head for masked tokens; it gets a new one, untrained, with its embedding as output", name)
    model = MaskedLM(network, vocab_size).train()
    model.fresh_head = bool(missing)
    return model


def masked_lm_small(
    vocab_size: int,
    block_size: int,
    pad_token_id: int = 0,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 2,
    intermediate_size: int | None = None,
    dropout: float = 0.1,
) -> MaskedLM:
    """Build a small BERT with fresh weights, whose output layer is the embedding.

    Args:
        vocab_size: Tokens of the tokenizer.
        block_size: Tokens of a block: the number of position embeddings.
        pad_token_id: The padding id.
        hidden_size: Width of the hidden states.
        num_layers: Number of layers.
        num_heads: Attention heads per layer; must divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers; None: 4 times `hidden_size`.
        dropout: Probability of dropping a hidden entry or an attention weight.

    Raises:
        ConfigError: A size below 1, or heads that do not divide the width.
    """
    check_sizes(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
    check_heads(num_heads, hidden_size)
    options: dict[str, Any] = {"attn_implementation": "sdpa"}  # taken by its base class
    config = BertConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=intermediate_size or 4 * hidden_size,
        max_position_embeddings=block_size,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **options,
    )
    return MaskedLM(BertForMaskedLM(config), vocab_size)
