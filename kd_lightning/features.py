"""How a network's intermediate activations are reached, by names that mean the same in every architecture.

| name | shape | what |
|---|---|---|
| `hidden[i]` | `(B, L, D)` | states after layer i; `hidden[0]` is what layer 1 reads, `hidden[-1]` the last |
| `embeddings` | `(B, L, D)` | the same as `hidden[0]` |
| `attention[i]` | `(B, H, L, L)` | attention probabilities of layer i, counted from 0; rows sum to 1 |
| `pooled` | `(B, D)` | what the classifier's last linear layer reads |
| `encoder.layer.3.output` | any | output of the module of that name |

`hidden` and `attention` are those of a Hugging Face network, or of the one inside another module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from kd_lightning.errors import ConfigError, did_you_mean
from kd_lightning.models.adapt import run_network, unwrap
from kd_lightning.types import Batch, ModelOutput

_INDEXED = re.compile(r"(hidden|attention)\[(-?\d+)\]")
_OUTPUTS = {"hidden": "hidden_states", "attention": "attentions"}  # Hugging Face's names of the same


class FeatureTap:
    """A network, and the features that are read along whenever it is called through this object.

    The names are checked here, before any batch. The hooks stay for the network's life (so that a later
    `torch.compile` sees them) but do nothing outside of `__call__`; they can be pickled and deep-copied with it.
    Attention probabilities exist in eager attention alone: asking for them switches the network to it, in place.
    In training mode attentions and `pooled` come after dropout, as the network itself uses them.

    Args:
        network: Any network; compiled and DDP-wrapped ones are looked into.
        names: Features to read; see the top of this file. None cost nothing.

    Raises:
        ConfigError: A name that the network does not have; the message lists the nearest that it has.
    """

    def __init__(self, network: nn.Module, names: Iterable[str] = ()) -> None:
        self.network = network
        self.names = tuple(dict.fromkeys(names))
        self._read: dict[str, Tensor] = {}
        self._open = False
        self._indexed: dict[str, tuple[str, int]] = {}  # feature -> field of the Hugging Face output, position
        root = unwrap(network)
        for name in self.names:
            self._connect(root, name)
        if self._indexed:
            encoder = _transformer(root)
            assert encoder is not None
            encoder.register_forward_pre_hook(self._request, with_kwargs=True)
            encoder.register_forward_hook(self._keep_indexed)

    def __call__(self, batch: Batch) -> ModelOutput:
        """Run the network on a batch: its logits, and the features by the names they were asked for.

        Raises:
            ConfigError: As `run_network`, or a module that did not run, or gave no tensor.
        """
        if not self.names:
            return run_network(self.network, batch)
        self._read = {}
        self._open = True
        try:
            output = run_network(self.network, batch)
        finally:
            self._open = False
            found, self._read = self._read, {}
        for name in self.names:
            if name not in found:
                raise ConfigError(f"feature {name!r}: its module did not run on this batch, or gave no tensor")
        return ModelOutput(output.logits, {**output.features, **{name: found[name] for name in self.names}})

    def _connect(self, root: nn.Module, name: str) -> None:
        modules = dict(root.named_modules())
        indexed = _INDEXED.fullmatch("hidden[0]" if name == "embeddings" else name)
        encoder, head = _transformer(root), _head(root)
        if name and name in modules:
            modules[name].register_forward_hook(partial(self._keep_output, name))
        elif indexed and encoder is not None:
            kind, position = indexed[1], int(indexed[2])
            self._indexed[name] = (_OUTPUTS[kind], _checked(name, kind, position, encoder))
            if kind == "attention":
                _make_eager(encoder)
        elif name == "pooled" and head is not None:
            head.register_forward_pre_hook(partial(self._keep_input, name))
        else:
            raise ConfigError(_unknown(name, root))

    def _keep_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._open and (tensor := _first_tensor(output)) is not None:
            self._read[name] = tensor

    def _keep_input(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._open and (tensor := _first_tensor(inputs)) is not None:
            self._read[name] = tensor

    def _request(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wanted = {f"output_{field}": True for field, _ in self._indexed.values()} if self._open else {}
        return args, {**kwargs, **wanted}

    def _keep_indexed(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._open:
            for name, (field, position) in self._indexed.items():
                if values := getattr(output, field, None):
                    self._read[name] = values[position]


def depth(network: nn.Module, kind: str) -> int:
    """Return how many layers a network has of a kind: those that `hidden[1..n]` or `attention[0..n-1]` name.

    Raises:
        ConfigError: It has none.
    """
    if (encoder := _transformer(unwrap(network))) is None:
        raise ConfigError(f"{type(unwrap(network)).__name__} has no {kind}[i]")
    return _layers(encoder)


def _transformer(root: nn.Module) -> nn.Module | None:
    """Return the outermost Hugging Face network with one stack of layers; known by its methods, nothing is imported."""
    return next((m for m in root.modules() if hasattr(m, "set_attn_implementation") and _layers(m)), None)


def _layers(module: nn.Module) -> int:
    """Return the number of layers of a Hugging Face network; 0 where there are two stacks, or none."""
    config: Any = module.config
    return 0 if config.is_encoder_decoder else int(getattr(config, "num_hidden_layers", 0))


def _head(root: nn.Module) -> nn.Module | None:
    """Return the last linear layer (also a quantised one), which gives the logits."""
    linear = [module for module in root.modules() if isinstance(getattr(module, "in_features", None), int)]
    return linear[-1] if linear else None


def _checked(name: str, kind: str, position: int, encoder: nn.Module) -> int:
    """Return the position if there is such a layer."""
    count = _layers(encoder) + (kind == "hidden")
    if not -count <= position < count:
        raise ConfigError(
            f"feature {name!r}: {type(encoder).__name__} has {_layers(encoder)} layers; {kind}[i] takes i from "
            f"{-count} to {count - 1}"
        )
    return position


def _make_eager(encoder: Any) -> None:
    encoder.set_attn_implementation("eager")
    if encoder.config._attn_implementation != "eager":
        raise ConfigError(
            f"attention[i]: {type(encoder).__name__} uses {encoder.config._attn_implementation} attention, which gives "
            "no probabilities, and cannot be switched: build the network with attn_implementation=eager"
        )


def _unknown(name: str, root: nn.Module) -> str:
    known = [path for path, _ in root.named_modules() if path]
    if (encoder := _transformer(root)) is not None:
        layers = _layers(encoder)
        known += ["embeddings", *(f"hidden[{i}]" for i in range(layers + 1))]
        known += [f"attention[{i}]" for i in range(layers)]
    if _head(root) is not None:
        known.append("pooled")
    hint = did_you_mean(name, known)
    if hint.startswith("; valid"):  # nothing is near: all modules of a large network would fill the screen
        hint = did_you_mean(name, [path for path in known if "." not in path])
    return f"feature {name!r}: {type(root).__name__} has none of this name{hint}"


def _first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of what a module gave or was given."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, ModelOutput):
        return value.logits
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for item in values if (found := _first_tensor(item)) is not None), None)
