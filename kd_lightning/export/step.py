"""A causal language model as a graph: a step with the keys and values of the tokens before it.

The graph's inputs are `input_ids` `(B, L)`, `attention_mask` `(B, P + L)` and, for each layer N,
`past_key_values.N.key` and `past_key_values.N.value` `(B, heads, P, D)`; its outputs `logits` `(B, L, V)` float32,
`present.N.key` and `present.N.value` `(B, heads, P + L, D)`. These are the names of `optimum` and onnxruntime-genai.
P is 0 at a text's beginning. Positions count what the mask keeps, so that padding may stand on the left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kd_lightning.evaluation.generation import ends_of, positions_of
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.hf import read_config
from kd_lightning.runtime.errors import ConfigError

PAST = "past_key_values."
"""What the names of cached inputs begin with."""

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A graph: from its inputs to its outputs, in order."""


class _Step(nn.Module):
    """A language model as a function from the graph's inputs to its outputs."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.network, self.vocab_size = model.network, model.vocab_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.network(
            input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return (output.logits[..., : self.vocab_size].float(), *_tensors(output.past_key_values))


def _tensors(cache: Any) -> list[Any]:
    """Return each layer's keys and values."""
    return [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]


def trace_step(model: CausalLM) -> tuple[ExportedProgram, list[str], dict[str, Any]]:
    """Return a language model as a graph, with its inputs' names and the dynamic axes of its arguments.

    Args:
        model: In eval mode, in the precision of the computation.

    Raises:
        ConfigError: Its state is not keys and values of each layer.
    """
    with torch.no_grad():
        found = _tensors(model.network(torch.zeros(2, 3, dtype=torch.long), use_cache=True).get("past_key_values"))
    if not found or any(not isinstance(one, Tensor) or one.ndim != 4 or one.shape[2] != 3 for one in found):
        raise ConfigError(
            f"{type(model.network).__name__} does not keep keys and values of each layer, from which a graph could go "
            "on; formats that need no graph: safetensors, huggingface"
        )
    names = [f"{PAST}{number // 2}.{'value' if number % 2 else 'key'}" for number in range(len(found))]
    batch, length, past = (
        Dim("batch", min=1),
        Dim("length", min=1, max=positions_of(model.network.config)),
        Dim("past", min=0),
    )
    axes = {
        "input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: Dim.AUTO},
        "past": tuple({0: batch, 2: past} for _ in found),
    }  # fmt: skip
    ids = torch.zeros(2, 4, dtype=torch.long)
    sample = (ids, torch.ones(2, 7, dtype=torch.long), *found)
    with torch.no_grad():
        program = torch.export.export(_Step(model).eval(), sample, dynamic_shapes=axes)
    ranges = program.range_constraints
    for symbol, known in ranges.items():
        if known.lower == 4:  # of the mask, as if neither P nor L could be below 2
            ranges[symbol] = ValueRanges(1, known.upper)
    return program, ["input_ids", "attention_mask", *names], axes


def outputs_of(inputs: Sequence[str]) -> list[str]:
    """Return the names of a graph's outputs by those of its inputs."""
    return ["logits", *(name.replace(PAST, "present.") for name in inputs if name.startswith(PAST))]


def is_step(inputs: Sequence[str]) -> bool:
    """Return whether these are the inputs of a language model's graph."""
    return any(name.startswith(PAST) for name in inputs)


class StepNetwork(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A language model's graph in some runtime, with which `transformers` generates.

    Args:
        config: The student's.
        run: The graph.
        shapes: Of the cached inputs, `(heads, D)` each.
        dtype: Theirs.
    """

    config_class = PreTrainedConfig

    def __init__(
        self, config: PreTrainedConfig, run: Run, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> None:
        super().__init__(config)
        self.run, self.shapes, self.cached = run, list(shapes), dtype

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def nothing(self, rows: int) -> list[Tensor]:
        """Return the cached inputs at a text's beginning."""
        return [torch.zeros(rows, heads, 0, size, dtype=self.cached) for heads, size in self.shapes]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **_: Any
    ) -> CausalLMOutputWithPast:
        """Predict the token after each one: logits `(B, L, V)`.

        Args:
            input_ids: `(B, L)`, those that come after the cached ones.
            attention_mask: `(B, P + L)`, 0 at padding; None: there is none.
            past_key_values: The cache that the step before returned, if there was one.
        """
        begun = past_key_values is not None and past_key_values.get_seq_length() > 0
        past = _tensors(past_key_values) if begun else self.nothing(len(input_ids))
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), past[0].shape[2] + input_ids.shape[1], dtype=torch.long)
        logits, *present = self.run([input_ids, attention_mask, *past])
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(present[::2], present[1::2], strict=True)):
            cache.update(keys, values, layer)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def set_ends(config: Any, generation: Any, tokenizer: Any) -> None:
    """Have a configuration name the tokens that begin, end and pad a text, by which generation stops.

    A generation ends with a chat's turn, too, where the tokenizer has a template for one.
    """
    ends = {True: ends_of(config, tokenizer, chat=True), False: ends_of(config, tokenizer, chat=False)}
    for one in (config, generation):
        found = ends[one is generation]
        one.bos_token_id, one.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        one.eos_token_id = found[0] if len(found) == 1 else found or None


def save_config(model: CausalLM, tokenizer: Any, folder: Path) -> None:
    """Write the configurations beside a graph, which `step_network` and runtimes of others read."""
    network: Any = model.network
    config, generation = copy.deepcopy(network.config), copy.deepcopy(network.generation_config)
    set_ends(config, generation, tokenizer)
    config.architectures, config.get_text_config().vocab_size = [type(network).__name__], model.vocab_size
    config.save_pretrained(folder)
    generation.save_pretrained(folder)


def step_network(folder: Path, run: Run, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> StepNetwork:
    """Return a graph as a network, with the configuration that stands beside it."""
    config = read_config(str(folder), str(folder), {"local_files_only": True, "trust_remote_code": False})
    network = StepNetwork(config, run, shapes, dtype)
    network.train(False)
    return network
