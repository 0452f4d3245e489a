"""Causal language models of Hugging Face: pretrained or small and new, over packed documents."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kd_lightning.models.adapt import evaluating
from kd_lightning.models.lora import ALL_LINEAR, Lora, add_adapters
from kd_lightning.models.pretrained_lm import check_whole, pretrained_lm
from kd_lightning.models.sizes import check_sizes
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import ModelOutput

log = logging.getLogger(__name__)


class CausalLM(nn.Module):
    """A causal language model of `transformers` that reads blocks of packed documents.

    The logits are the model's own, with the soft-capping or scaling that Gemma, Cohere and others put behind their
    output layer, and without the rows by which an embedding is larger than the vocabulary. Each token attends to its
    own document alone, wherever a batch has `document_ids`.

    Args:
        network: Any `AutoModelForCausalLM`. Its `padding_idx` is unset: what pads may be a token of the text too, and
            an embedding with this index would never learn it.
        vocab_size: Tokens of the tokenizer.
        logits_in_training: False leaves the output layer out of training, where a loss takes it chunk by chunk:
            `logits` are `(B, L, 0)` then, and the features `last_hidden` `(B, L, H)`, `head` `(V, H)` and, if there is
            one, `head_bias` `(V,)`.
        lora: Fresh adapters to add, which alone are trained; None: all of the network is.

    Raises:
        ConfigError: What it predicts for a token depends on later ones; or `logits_in_training=False`, and more than a
            linear layer makes the logits; or it cannot have these adapters.
    """

    VERSION = 1
    """Goes up when it predicts something else with the same weights."""

    def __init__(
        self, network: PreTrainedModel, vocab_size: int, logits_in_training: bool = True,
        lora: Lora | Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.vocab_size, self.logits_in_training = network, vocab_size, logits_in_training
        embedding: Any = network.get_input_embeddings()
        embedding.padding_idx = None
        name = type(network).__name__
        with torch.no_grad(), evaluating(network):
            if not _is_causal(network):
                raise ConfigError(f"{name} predicts a token from later ones too: it is no causal language model")
            self._isolates = _isolates(network)
            if not logits_in_training and not _head_is_linear(network):
                raise ConfigError(
                    f"logits_in_training=false: {name} does more than multiply with a matrix to make its logits (it "
                    "caps or scales them), which a loss from hidden states would leave out: set it to true"
                )
        self.lora = lora if lora is None or isinstance(lora, Lora) else Lora(**lora)
        if self.lora is not None:
            add_adapters(network, self.lora)

    @property
    def arguments(self) -> dict[str, Any]:
        """What builds it again, beside the network."""
        own = {} if self.lora is None else {"lora": asdict(self.lora)}
        return {"vocab_size": self.vocab_size, "logits_in_training": self.logits_in_training, **own}

    @property
    def unchanged(self) -> list[str]:
        """Names of the weights that training leaves as they are: all but the adapters, where there are some."""
        parts = () if self.lora is None else self.named_parameters(remove_duplicate=False)
        return [name for name, weight in parts if not weight.requires_grad]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Predict the token after each one: logits `(B, L, V)`.

        Args:
            input_ids: `(B, L)`.
            attention_mask: `(B, L)`, 0 at padding; not read where there are documents.
            position_ids: `(B, L)`, beginning again with each document and at each padding.
            document_ids: `(B, L)`, which document each token is of.
        """
        given: dict[str, Any] = {"use_cache": False, "attention_mask": attention_mask}
        if document_ids is not None:
            self._check_documents(position_ids)
            # Without a mask and a cache transformers tells documents apart by positions that begin again, for every
            # kind of layer (also sliding windows); padding, at which each position is 0, is a document a token.
            given |= {"attention_mask": None, "position_ids": position_ids}
        if self.logits_in_training or not self.training:
            return ModelOutput(self.network(input_ids, **given).logits[..., : self.vocab_size])
        hidden = self.network.base_model(input_ids, **given).last_hidden_state
        head = _head(self.network)
        features = {"last_hidden": hidden, "head": head.weight[: self.vocab_size]}
        if head.bias is not None:
            features["head_bias"] = head.bias[: self.vocab_size]
        return ModelOutput(hidden[..., :0], features)

    def _check_documents(self, position_ids: Tensor | None) -> None:
        name, attention = type(self.network).__name__, self.network.config._attn_implementation
        if not self._isolates:
            raise ConfigError(f"{name} cannot keep packed documents apart: set data.packing=none, or concat")
        if str(attention).startswith("flash"):
            raise ConfigError(f"attn_implementation={attention}: it does not keep packed documents apart; use sdpa")
        if position_ids is None:
            raise ConfigError("the batch has document_ids and no position_ids, by which documents are kept apart")


def causal_lm(
    name: str,
    vocab_size: int,
    block_size: int | None = None,
    attn_implementation: str | None = None,
    logits_in_training: bool = True,
    trust_remote_code: bool = False,
) -> CausalLM:
    """Load a pretrained causal language model, in float32 and training mode.

    Args:
        name: A folder saved by `save_pretrained`, a GGUF file, which is dequantised to bfloat16 once, or a name on the
            Hugging Face hub.
        vocab_size: Tokens of the data's tokenizer, which must be the model's own.
        block_size: Tokens of a block.
        attn_implementation: `sdpa`, `eager`, ...; None: sdpa.
        logits_in_training: As for `CausalLM`.
        trust_remote_code: Run the Python files that the checkpoint brings.

    Raises:
        ConfigError: No such folder or name, no causal language model, another vocabulary than the data's, or blocks
            that are longer than it has positions.
    """
    network = _pretrained(name, vocab_size, block_size, attn_implementation, trust_remote_code)
    return CausalLM(network, vocab_size, logits_in_training).train()


def causal_lm_lora(
    name: str,
    vocab_size: int,
    block_size: int | None = None,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | list[str] = ALL_LINEAR,
    attn_implementation: str | None = None,
    logits_in_training: bool = True,
    trust_remote_code: bool = False,
) -> CausalLM:
    """Load a pretrained causal language model, of which only fresh adapters are trained.

    Args:
        name: As for `causal_lm`, and so all that is not described here.
        vocab_size: Tokens of the data's tokenizer.
        block_size: Tokens of a block.
        r: Rank of the adapters.
        alpha: Their scale, times r.
        dropout: Probability of dropping an entry of what they read.
        targets: Names of the layers that have one, or `all-linear`: all but the output layer.
        attn_implementation: As there.
        logits_in_training: As there.
        trust_remote_code: As there.

    Raises:
        ConfigError: As for `causal_lm` and `Lora`.
    """
    lora = Lora(r, alpha, dropout, targets)
    network = _pretrained(name, vocab_size, block_size, attn_implementation, trust_remote_code)
    return CausalLM(network, vocab_size, logits_in_training, lora).train()


def _pretrained(
    name: str, vocab_size: int, block_size: int | None, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """Load the network of `causal_lm`."""
    network, missing = pretrained_lm(
        AutoModelForCausalLM, "a causal language model", name, vocab_size, block_size, attn_implementation,
        trust_remote_code,
    )  # fmt: skip
    check_whole(name, missing)
    return network


def causal_lm_small(
    vocab_size: int,
    block_size: int,
    hidden_size: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    tie_embeddings: bool = True,
    logits_in_training: bool = True,
) -> CausalLM:
    """Build a small Llama with fresh weights.

    Args:
        vocab_size: Tokens of the tokenizer.
        block_size: Tokens of a block: the longest text it is made for.
        hidden_size: Width of the hidden states.
        num_layers: Number of layers.
        num_heads: Attention heads per layer; must divide `hidden_size`.
        num_key_value_heads: Heads of keys and values, which several heads of queries share; None: as many.
        intermediate_size: Width of the feed-forward layers; None: 8/3 of `hidden_size`, rounded up to a multiple of 32.
        tie_embeddings: Whether the output layer is the embedding.
        logits_in_training: As for `CausalLM`.

    Raises:
        ConfigError: A size below 1, or heads that do not divide.
    """
    groups = num_heads if num_key_value_heads is None else num_key_value_heads
    check_sizes(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, num_key_value_heads=groups)
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise ConfigError(
            f"num_heads={num_heads}: hidden_size={hidden_size} cannot be shared out to them in even parts, as rotary "
            "positions need: choose another number"
        )
    if num_heads % groups:
        raise ConfigError(f"num_key_value_heads={groups} does not divide num_heads={num_heads}: choose a divisor")
    options: dict[str, Any] = {"attn_implementation": "sdpa"}  # taken by its base class
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=groups,
        intermediate_size=intermediate_size or -(-hidden_size * 8 // 3 // 32) * 32,
        max_position_embeddings=block_size,
        tie_word_embeddings=tie_embeddings,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,  # the tokenizer's to set
        **options,
    )  # fmt: skip
    return CausalLM(LlamaForCausalLM(config), vocab_size, logits_in_training)


@torch.no_grad()
def trimmed(model: CausalLM, ids: Sequence[int]) -> CausalLM:
    """Return a model, changed in place, that reads and predicts these of its tokens only, renumbered.

    Its logits are those of the whole model for a text of such tokens, so its probabilities are the whole model's, given
    that no other token comes.

    Args:
        model: The whole model.
        ids: The old number of each token.
    """
    network: Any = model.network
    rows, config = torch.tensor(ids), network.config.get_text_config()
    new: dict[int, nn.Parameter] = {}  # one where embedding and output layer share it
    for layer in (network.get_input_embeddings(), _head(network)):
        old = layer.weight
        layer.weight = new.setdefault(id(old), nn.Parameter(old[rows].clone()))
        if getattr(layer, "bias", None) is not None:
            layer.bias = nn.Parameter(layer.bias[rows].clone())
        setattr(layer, "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features", len(ids))
    config.vocab_size = len(ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # old numbers; the tokenizer has the new ones
        setattr(config, name, None)
        setattr(network.generation_config, name, None)
    return CausalLM(network, len(ids), model.logits_in_training)


# -- probes of a network's predictions ---------------------------------------------------------------------------------


def _probe(network: PreTrainedModel, ids: list[list[int]], **given: Any) -> Tensor:
    found: Tensor = network(torch.tensor(ids, device=network.device), use_cache=False, **given).logits.float()
    return found


def _near(one: Tensor, other: Tensor, network: PreTrainedModel) -> bool:
    tolerance = 1e-3 if network.dtype == torch.float32 else 2e-2  # SmolLM2, 30 layers deep, rounds to 3e-5
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


def _is_causal(network: PreTrainedModel) -> bool:
    """Return whether another last token leaves what is predicted before it as it is."""
    logits = _probe(network, [[1, 2, 3], [1, 2, 4]])
    return _near(logits[0, :2], logits[1, :2], network)


def _isolates(network: PreTrainedModel) -> bool:
    """Return whether a document's predictions do not depend on one before it, by position ids."""
    if "position_ids" not in inspect.signature(network.forward).parameters:
        return False
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=network.device)
    alone = _probe(network, [[3, 1, 2]])
    logits = _probe(network, [[4, 2, 1, 3, 1, 2]], position_ids=positions)
    return _near(alone[0], logits[0, 3:], network)


def _head(network: PreTrainedModel) -> Any:
    return network.get_output_embeddings()  # type: ignore[no-untyped-call]


class _Ramp(nn.Module):
    """An output layer whose logits are known, up to 100 and down to -100."""

    ramp: Tensor

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias
        self.register_buffer("ramp", torch.linspace(-100, 100, len(like.weight), device=like.weight.device))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ramp.expand(*hidden.shape[:-1], -1)


def _head_is_linear(network: PreTrainedModel) -> bool:
    """Return whether the logits are what the output layer puts out, neither capped nor scaled."""
    head = _head(network)
    if not isinstance(head, nn.Linear):
        return False
    ramp = _Ramp(head)
    network.set_output_embeddings(ramp)  # type: ignore[no-untyped-call]
    try:
        logits = _probe(network, [[1, 2]])
    finally:
        network.set_output_embeddings(head)  # type: ignore[no-untyped-call]
    return torch.equal(logits[0, 0], ramp.ramp)
