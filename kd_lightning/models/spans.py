"""Networks of spans as transformers has them: classifiers of tokens by another name, and back."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, PreTrainedModel

from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch, ModelOutput

KIND = "ForQuestionAnswering"


class SpanNetwork(nn.Module):
    """A network for question answering, whose logits of starts and ends are `(B, L, 2)`."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        self._takes_segments = "token_type_ids" in inspect.signature(network.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ModelOutput:
        """Return the logits of a batch of `(B, L)` token ids."""
        segments = {"token_type_ids": token_type_ids} if self._takes_segments else {}
        output = self.network(input_ids=input_ids, attention_mask=attention_mask, **segments)
        return ModelOutput(torch.stack([output.start_logits, output.end_logits], 2))


def as_tokens(network: PreTrainedModel) -> PreTrainedModel:
    """Return a network for question answering as the classifier of tokens that has its weights.

    Raises:
        ConfigError: As `for_questions`.
    """
    return _as(network, AutoModelForTokenClassification)


def for_questions(network: nn.Module) -> PreTrainedModel:
    """Return a classifier of tokens as the network for question answering that has its weights.

    Raises:
        ConfigError: transformers has none of this architecture, or one that computes something else.
    """
    if not isinstance(network, PreTrainedModel):
        raise ConfigError(f"{type(network).__name__} is no network of transformers")
    return _as(network, AutoModelForQuestionAnswering)


def _as(network: PreTrainedModel, kind: Any) -> PreTrainedModel:
    """Return the network of another kind with the same weights, the head's under its names there."""
    config = copy.deepcopy(network.config)
    config.architectures = None
    try:
        other: Any = kind.from_config(config, attn_implementation=config._attn_implementation)
    except ValueError as error:
        raise ConfigError(f"transformers has no {kind.__name__} of {type(network).__name__}: {error}") from error
    state, wanted = network.state_dict(), other.state_dict()
    heads = [[name for name in one if name not in two] for one, two in ((state, wanted), (wanted, state))]
    shapes = [[tuple(part[name].shape) for name in names] for names, part in zip(heads, (state, wanted), strict=True)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{type(network).__name__} has the head {', '.join(heads[0])}, and {type(other).__name__} "
            f"{', '.join(heads[1])}: one is not the other by another name"
        )
    renamed = dict(zip(heads[0], heads[1], strict=True))
    other.load_state_dict({renamed.get(name, name): value for name, value in state.items()})
    other.to(next(network.parameters()).dtype).train(network.training)
    _check_same(network, other)
    return other  # type: ignore[no-any-return]


def _check_same(network: PreTrainedModel, other: PreTrainedModel) -> None:
    """Refuse two classes of which one attends otherwise, as Longformer's does to all of the question."""
    batch = _probe(network)
    found: list[Tensor] = []
    for one in (network, other):
        whole = SpanNetwork(one) if type(one).__name__.endswith(KIND) else one
        with evaluating(one), torch.inference_mode():
            found.append(run_network(whole, batch).logits)
    if not torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-5):
        raise ConfigError(
            f"{type(network).__name__} and {type(other).__name__} of transformers compute different logits with the "
            "same weights: one is not the other by another name"
        )


def _probe(network: PreTrainedModel) -> Batch:
    """Return a question and a context of made tokens, with separators as most tokenizers put them."""
    config, device = network.config, network.device
    first, end, separator, padding = (
        getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "pad")
    )
    words = [number for number in range(config.vocab_size) if number not in (first, end, separator, padding)]
    between = next((one for one in (separator, end) if one is not None), words[0])
    row = [words[0] if first is None else first, *words[1:4], between, between, *words[4:8], between]
    segments = [0] * 6 + [int(getattr(config, "type_vocab_size", 0) > 1)] * 5
    ids, types = torch.tensor([row], device=device), torch.tensor([segments], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
