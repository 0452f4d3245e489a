"""Call any network on a batch and get a `ModelOutput`, whatever its forward takes and returns.

This is the only place where the package calls a user's network, so a plain `nn.Module` needs no wrapper class:

* its forward names the batch entries it wants (`input_ids`, `attention_mask`, `pixel_values`, ...), or has one
  required parameter of any name, which then gets `input_ids` or `pixel_values`;
* it returns a Tensor, a tuple or list (its first Tensor is the logits), a dict with `logits`, an object with
  `.logits` (every Hugging Face output) or a `ModelOutput`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import Batch, ModelOutput

NEVER_READ = (
    "labels", "keep", "index", "task", "token_bytes", "of_document", "begins", "window_of", "spans", "group", "place",
    "text", "score", "rows", "question",
)  # fmt: skip
"""Entries of a batch that state what is predicted of it."""

PLACES = "masked_places"
"""The entry that says of which tokens there are logits."""

_MAIN_ENTRIES = ("input_ids", "pixel_values")
_PARALLEL_WRAPPERS = (DistributedDataParallel, DataParallel, FullyShardedDataParallel)


def run_network(network: nn.Module, batch: Batch) -> ModelOutput:
    """Run `network` on the entries of `batch` that its forward names, and return a `ModelOutput`.

    `NEVER_READ` and `teacher_*` are never passed: a network sees what it will see when deployed. A forward with
    `**kwargs` that does not name `attention_mask` gets every other entry, so that a thin wrapper of the user's does not
    lose the mask. Compiled and DDP/FSDP-wrapped networks are called through their wrappers, with the signature of what
    they wrap.

    Where a batch has `masked_places` `(B, M)`, logits are of these tokens alone: a forward that names them computes no
    others, and of any other network's logits `(B, L, V)` these rows are returned.

    Args:
        network: Any module; see the top of this file for what its forward may take and return.
        batch: Tensors by Hugging Face's names.

    Returns:
        The network's own `ModelOutput`, or a new one with its logits and no features.

    Raises:
        ConfigError: The forward needs something that the batch lacks, or returned something without logits.
    """
    forward = _forward_of(unwrap(network))
    names = [name for name in batch if is_input(name)] if forward.takes_everything else forward.names
    if "document_ids" in batch and "document_ids" not in names:
        raise ConfigError(
            f"cannot call {type(unwrap(network)).__name__} on packed documents: its forward takes no document_ids, and "
            "would attend from one document to another; use kd_lightning.models.causal_lm.CausalLM, or another "
            "data.packing"
        )
    arguments = {name: _narrowed(batch[name], network) for name in names if name in batch}
    missing = [name for name in forward.required if name not in arguments]
    places = None if forward.takes_places else batch.get(PLACES)
    if arguments and not missing:
        if forward.takes_places and PLACES in batch:
            arguments[PLACES] = batch[PLACES]
        return _at(places, _as_output(network(**arguments), network))
    main = next((name for name in _MAIN_ENTRIES if name in batch and name not in forward.names), None)
    if main is not None and missing and missing == forward.main_parameter:
        arguments.pop(main, None)  # for forward(x, **kwargs): not by position and by name
        return _at(places, _as_output(network(_narrowed(batch[main], network), **arguments), network))
    raise ConfigError(_cannot_call(network, forward, missing, batch))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode for a block, then restore the mode of each module."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def unwrap(network: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DDP, DataParallel and FSDP wrappers, if any."""
    while True:
        if isinstance(network, OptimizedModule):
            network = network._orig_mod
        elif isinstance(network, _PARALLEL_WRAPPERS):
            network = network.module
        else:
            return network


@dataclass(frozen=True)
class _Forward:
    """The signature of a forward, inspected once instead of in every step."""

    names: tuple[str, ...]  # parameters that can be passed by keyword
    required: list[str]  # those without a default
    main_parameter: list[str]  # the first one, if it is required: gets the main tensor whatever its name
    takes_everything: bool  # **kwargs, and the mask is not among the names
    takes_places: bool


def _forward_of(module: nn.Module) -> _Forward:
    forward = module.forward
    return _inspect(getattr(forward, "__func__", forward), inspect.ismethod(forward))


@lru_cache(maxsize=256)
def _inspect(function: Callable[..., Any], is_method: bool) -> _Forward:
    parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = tuple(p.name for p in named if p.kind is not p.POSITIONAL_ONLY and is_input(p.name))
    required = [p.name for p in named if p.default is p.empty]
    by_position = [p.name for p in named[:1] if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    has_keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes_places = any(p.name == PLACES for p in named)
    return _Forward(names, required, by_position, has_keywords and "attention_mask" not in names, takes_places)


def _narrowed(x: Tensor, network: nn.Module) -> Tensor:
    """Cast images to 16 bits for a network with only 16-bit weights; return anything else unchanged."""
    if not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    weight = next(network.parameters(), None)
    return x.to(weight.dtype) if weight is not None and weight.dtype in (torch.float16, torch.bfloat16) else x


def is_input(name: str) -> bool:
    """Say whether a network may see this entry of a batch."""
    return name not in NEVER_READ and name != PLACES and not name.startswith("teacher_")


def _at(places: Tensor | None, output: ModelOutput) -> ModelOutput:
    """Return an output with the logits of these tokens alone; as it is where it has no row for each token."""
    if places is None or output.logits.ndim != 3:
        return output
    return replace(output, logits=at_places(output.logits, places))


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """Return the rows `(B, M, H)` of values `(B, L, H)` at places `(B, M)`."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def _as_output(output: Any, network: nn.Module) -> ModelOutput:
    if isinstance(output, ModelOutput):
        return output
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple | list):
        logits = next((item for item in output if isinstance(item, Tensor)), None)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{type(unwrap(network)).__name__} returned {_describe_value(output)}, which has no logits; its forward "
            "must return a Tensor of logits, a tuple that begins with one, a dict with 'logits', or an output with "
            ".logits (for a Hugging Face encoder without a classifier use model@student=hf, which adds one)"
        )
    return ModelOutput(logits)


def _describe_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    return f"a {type(value).__name__}"


def _cannot_call(network: nn.Module, forward: _Forward, missing: list[str], batch: Batch) -> str:
    name = type(unwrap(network)).__name__
    needs = f"needs {', '.join(missing)}" if missing else f"takes only {', '.join(forward.names) or 'nothing'}"
    has = ", ".join(entry for entry in batch if is_input(entry)) or "no inputs"
    return (
        f"cannot call {name}: its forward {needs}, but the batch has {has} (labels, index and teacher_* are never "
        "passed); rename the forward's parameters to the batch's names and give the others a default"
    )
