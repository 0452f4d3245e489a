"""Generates text with a causal language model, word by word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, TextStreamer

from kd_lightning.data.text.ends import text_ends
from kd_lightning.models.adapt import unwrap
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.hf import quiet_loading
from kd_lightning.runtime.errors import ConfigError, DataError
from kd_lightning.tasks.base import refuse_nan

if TYPE_CHECKING:
    from kd_lightning.training.run_folder import TrainedModel

Emit = Callable[[str], None]

RECORD = ("text", "tokens", "finish_reason")
"""What `generate` returns."""


@dataclass(frozen=True)
class Decoding:
    """How the next tokens are chosen.

    Attributes:
        max_new_tokens: Where a text that does not end by itself is cut.
        temperature: 0 takes the likeliest token each time; above, one is drawn from `softmax(logits / temperature)`.
        top_p: Drawn from the likeliest tokens that have this probability together.
        seed: Of the draw. A prompt's text depends on it and not on the prompts before.
        chat: Whether a prompt is a user's turn in the tokenizer's chat template, and not the beginning of a text.

    Raises:
        ConfigError: A value out of its range; names the option of `kd predict`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: give a whole number of at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature:g}: give a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p:g}: give a probability above 0")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(f"--top-p {self.top_p:g}: nothing is drawn at --temperature 0; leave one of them out")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--sampling-seed {self.seed}: give a whole number of at least 0")


def generate(model: TrainedModel, prompt: str, decoding: Decoding, emit: Emit | None = None) -> dict[str, Any]:
    """Return the text that a language model generates after a prompt.

    Args:
        model: A language model of `transformers`, from a run or an export.
        prompt: The beginning of a text, or a user's turn.
        decoding: How tokens are chosen.
        emit: Called with each piece of the text as soon as its words are complete.

    Returns:
        `text`, `tokens` (how many were generated) and `finish_reason`: `stop` where the text ended, `length` where it
        was cut by `max_new_tokens` or by the network's positions.

    Raises:
        ConfigError: The network cannot generate, or the tokenizer has no usable chat template.
        DataError: The prompt has no tokens, or more than the network has positions.
        KDError: The network predicts NaN.
    """
    network, tokenizer = generator_of(model.network), model.tokenizer
    if network is None or tokenizer is None:
        raise ConfigError(
            f"the model in {model.folder} is a {type(unwrap(model.network)).__name__} and generates no text: only "
            "language models of transformers do (causal_lm, causal_lm_small, causal_lm_from_teacher)"
        )
    ids = _chat_ids(model, tokenizer, prompt) if decoding.chat else _text_ids(tokenizer, prompt)
    ends = ends_of(network.config, tokenizer, decoding.chat)
    new = continued(model.network, ids, decoding, ends, None if emit is None else _Pieces(tokenizer, emit))
    text = tokenizer.decode(new, skip_special_tokens=True)
    return dict(zip(RECORD, (text, len(new), "stop" if new[-1] in ends else "length"), strict=True))


def generator_of(network: nn.Module) -> Any:
    """Return what of a network generates with `transformers`; None where it is no language model."""
    network = unwrap(network)
    inner = network.network if isinstance(network, CausalLM) else network
    return inner if isinstance(inner, GenerationMixin) else None


def continued(
    network: nn.Module, ids: list[int], decoding: Decoding, ends: list[int] | None = None, streamer: Any = None
) -> list[int]:
    """Return the tokens that a language model generates after others.

    Args:
        network: A language model, which `generator_of` finds something in.
        ids: The tokens before.
        decoding: How tokens are chosen.
        ends: Tokens that end a text; none: it is as long as `max_new_tokens` and the network's positions allow.
        streamer: Is handed the tokens as they come.

    Raises:
        DataError: There are no tokens before, or more than the network has positions.
        KDError: The network predicts NaN.
    """
    generator, network = generator_of(network), unwrap(network)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=_room(generator.config, ids, decoding.max_new_tokens), eos_token_id=ends or None,
        pad_token_id=0, use_cache=True, repetition_penalty=1.0,  # of one text nothing is padded
        **({"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
           if decoding.temperature else {"do_sample": False}),
    )  # fmt: skip
    size = network.vocab_size if isinstance(network, CausalLM) else generator.config.vocab_size
    rows = torch.tensor([ids])
    with torch.inference_mode(), torch.random.fork_rng(devices=[]), quiet_loading(hide_bar=False):
        torch.manual_seed(decoding.seed)
        found = generator.generate(
            rows, attention_mask=torch.ones_like(rows), generation_config=config,
            logits_processor=[_Vocabulary(size)], streamer=streamer,
        )  # fmt: skip
    new: list[int] = found[0, len(ids) :].tolist()
    return new


class _Vocabulary(LogitsProcessor):
    """Keeps to the tokenizer's tokens, where an embedding has more rows, and refuses NaN."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the logits of the next token, -inf for rows that no token has."""
        refuse_nan(scores)
        found: Tensor = scores.clone()
        found[:, self.size :] = -torch.inf
        return found


class _Pieces(TextStreamer):
    """Calls a function with each piece of text."""

    def __init__(self, tokenizer: Any, emit: Emit) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece on."""
        self.emit(text)


def _text_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return a text's tokens as in training, but without those that would end it."""
    encoded = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while len(ids) > 1 and added[len(ids) - 1]:
        ids.pop()
    return ids


def _chat_ids(model: TrainedModel, tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a conversation that waits for its first reply."""
    return list(tokenizer(_rendered(model, tokenizer, prompt), add_special_tokens=False, verbose=False)["input_ids"])


def _rendered(model: TrainedModel, tokenizer: Any, prompt: str) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError(f"--chat: the tokenizer of {model.folder} has no chat template: leave --chat out")
    turns = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        why = str(error) or type(error).__name__
        raise ConfigError(f"--chat: the chat template of {model.folder} cannot hold a user's turn ({why})") from error


def ends_of(config: Any, tokenizer: Any, chat: bool) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, the checkpoint's, in a chat also that of a turn."""
    own = getattr(config, "eos_token_id", None)
    found = [*own] if isinstance(own, list) else [own]
    return sorted({*text_ends(tokenizer, chat), *(int(end) for end in found if end is not None)})


def positions_of(config: Any) -> int | None:
    """Return how many tokens a network has positions for, if there is a limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def _room(config: Any, ids: list[int], wanted: int) -> int:
    """Return how many tokens there is room for after a prompt."""
    if not ids:
        raise DataError("a prompt has nothing that the tokenizer knows: write something else")
    positions = positions_of(config)
    if positions is None:
        return wanted
    if len(ids) >= positions:
        raise DataError(f"a prompt has {len(ids)} tokens, and the network positions for {positions}: shorten it")
    return min(wanted, positions - len(ids))
