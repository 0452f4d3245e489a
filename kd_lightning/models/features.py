"""Captures a network's intermediate activations, by names that mean the same in every architecture.

| name | shape | what | where |
|---|---|---|---|
| `hidden[i]` | `(B, L, D)` | states after layer i, before any final normalisation; layer 1 reads `hidden[0]` | 1, 2 |
| `embeddings` | `(B, L, D)` | the same as `hidden[0]` | 1, 2 |
| `attention[i]` | `(B, H, L, L)` | attention probabilities of layer i, counted from 0; rows sum to 1 | 1, 2 |
| `qkv[i]` | `(B, L, 3, D)` | its query, key and value projections, before they are split into heads | 1, 2 |
| `feature_maps[i]` | `(B, C, H, W)` | output of stage i, counted from 0 | 1, 3 |
| `pooled` | `(B, D)` | input of the classifier (the linear layer registered last), before its dropout (4) | 1, all |
| `cam` | `(B, classes, H, W)` | output of that layer, without its bias, at each place of the last feature map | 1, 3 |
| `encoder.layer.3.output` | any | output of the module of that name, after in-place changes by later modules | all |

1. A network that names them: any module with an attribute `feature_names: dict[str, str]`, from names of this table (or
   of its own) to the names of the modules that output them; `hidden[i]` for every i from 0 to the number of layers,
   the other kinds from 0 on. Ours have one (`BiLSTM`, `TextCNN`, `CNN`, `ResNet`); a wrapper around such a module
   needs none. An empty one: the network has no features of a batch's rows, and any name is refused (`BiEncoder`).
2. A Hugging Face network with one stack of layers, or the one inside another module. `qkv[i]` where each layer has a
   query, key and value projection of its own (BERT, RoBERTa, DistilBERT, ELECTRA, DeBERTa, ViT, DeiT, ...).
3. A timm network, by its `feature_info` (`hidden[i]` for its vision transformers); one with a list of modules called
   `stages` (Hugging Face's ResNet, RegNet, ConvNeXt); one with modules `layer1`, `layer2`, ... (torchvision's ResNet).
4. What goes into the `nn.Dropout` directly in front of it, in the same module. If the
   dropout is a function (in some of timm's networks) or elsewhere, the layer's own input: in training after dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from kd_lightning.models.adapt import run_network, unwrap
from kd_lightning.models.attention import give_probabilities, register_attention
from kd_lightning.models.feature_names import (
    count_features,
    feature_sources,
    find_feature,
    lacks,
    outermost_transformer,
)
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.sharding import full
from kd_lightning.types import Batch, ModelOutput


class FeatureTap:
    """Runs a network and captures features with hooks.

    The names are checked here, before any batch. The hooks stay for the network's life (so that a later
    `torch.compile` sees them) but do nothing outside of `__call__`, and nothing is kept after it; they can be pickled
    and deep-copied with the network. Works with compiled networks (if they have not run before), inside DDP, and with
    activation checkpointing; a feature that re-entrant checkpointing cuts off from the graph is refused.

    In training mode `pooled` and attentions are from before dropout, while the network itself continues with the
    dropped ones, as without this tap. To capture attentions, a Hugging Face network is switched in place to eager
    attention (`kd_lightning.models.attention`), which computes the attention a second time in training if it has
    dropout. A network whose attention cannot be switched must be eager already; its attentions are used as they are.

    Args:
        network: Any network; compiled and DDP-wrapped ones are looked into.
        names: Features to capture; see the top of this file. Without any, nothing is hooked.

    Raises:
        ConfigError: A name that the network does not have; the message lists similar names.
    """

    def __init__(self, network: nn.Module, names: Iterable[str] = ()) -> None:
        self.network = network
        self.names = tuple(dict.fromkeys(names))
        self._open = False
        self._read: dict[tuple[str, int], tuple[Tensor, bool]] = {}  # feature, part: value, was autograd on
        root = unwrap(network)
        available = feature_sources(root) if self.names else {}
        self._sources = {name: find_feature(name, available, root) for name in self.names}
        self._connect(root)

    def __call__(self, batch: Batch) -> ModelOutput:
        """Run the network on a batch and return its logits and the requested features by name.

        Raises:
            ConfigError: As `run_network`, or a feature that the network did not compute, or computed without a graph.
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
        features = {name: self._feature(name, found) for name in self.names}
        return ModelOutput(output.logits, {**output.features, **features}, output.sparse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; registers our attention in a new process."""
        self.__dict__.update(state)
        if self._attends():
            register_attention()

    def _connect(self, root: nn.Module) -> None:
        if self._attends():
            give_probabilities(outermost_transformer(root)[1])
        encoders = {}
        for name, source in self._sources.items():
            for part, path in enumerate(source.modules):
                module = root.get_submodule(path)
                if source.what in ("output", "attention"):
                    module.register_forward_hook(partial(self._keep_output, (name, part), source.what == "attention"))
                elif source.what in ("input", "undropped"):
                    module.register_forward_pre_hook(partial(self._keep_input, (name, part)), with_kwargs=True)
                    if source.what == "undropped":
                        self._watch_dropouts(name, root.get_submodule(path.rpartition(".")[0]))
                else:
                    encoders[path] = module
        for encoder in encoders.values():  # one at most
            encoder.register_forward_pre_hook(self._request, with_kwargs=True)
            encoder.register_forward_hook(self._keep_fields)

    def _watch_dropouts(self, name: str, parent: nn.Module) -> None:
        """Keep a dropout's input and output as parts 1 and 2 of a feature; the last call counts."""
        for module in (child for child in parent.children() if isinstance(child, nn.Dropout)):
            module.register_forward_pre_hook(partial(self._keep_input, (name, 1)), with_kwargs=True)
            if module.inplace:  # work on a copy; versions then count what others do in place
                module.register_forward_pre_hook(self._copy)
                module.register_forward_hook(self._copy)
            module.register_forward_hook(partial(self._keep_output, (name, 2), 0))

    def _attends(self) -> bool:
        """Return True if attention probabilities of a Hugging Face network are read."""
        return any(source.what in ("attention", "attentions") for source in self._sources.values())

    # The hooks only store: in a checkpointed layer, what they compute is missing when it runs again.

    def _keep_output(self, key: tuple[str, int], which: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._open and (tensor := _first_tensor(output[which] if which else output)) is not None:
            self._read[key] = tensor, torch.is_grad_enabled()

    def _keep_input(self, key: tuple[str, int], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._open and (tensor := _first_tensor((args, kwargs))) is not None:
            self._read[key] = tensor, torch.is_grad_enabled()

    def _request(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wanted = {source.what for source in self._sources.values()} & {"hidden_states", "attentions"}
        return args, {**kwargs, **{f"output_{what}": True for what in wanted}} if self._open else kwargs

    def _keep_fields(self, module: nn.Module, inputs: Any, output: Any) -> None:
        for name, source in self._sources.items() if self._open else ():
            if source.what in ("hidden_states", "attentions") and (values := getattr(output, source.what, None)):
                self._read[name, 0] = values[source.position], torch.is_grad_enabled()

    def _copy(self, module: nn.Module, inputs: Any, output: Tensor | None = None) -> Tensor | None:
        return (inputs[0] if output is None else output).clone() if self._open else None

    def _feature(self, name: str, found: dict[tuple[str, int], tuple[Tensor, bool]]) -> Tensor:
        """Return a captured feature, after checking its shape and graph."""
        source = self._sources[name]
        parts = [found[name, part] for part in range(len(source.modules)) if (name, part) in found]
        if len(parts) < len(source.modules):
            ran_before = "; a compiled network must not have run before its FeatureTap is made"
            why = ran_before if _is_compiled(self.network) else ""
            raise ConfigError(f"feature {name!r}: its module did not run on this batch, or output no tensor{why}")
        if source.what == "undropped" and (name, 2) in found and _is_unchanged(found[name, 2][0], parts[0][0]):
            parts = [found[name, 1]]
        tensors = [tensor for tensor, _ in parts]
        if torch.is_grad_enabled() and not all(on for _, on in parts):
            raise ConfigError(
                f"feature {name!r} was computed without a graph, so a loss on it would not train the network: it lies "
                "inside torch.no_grad or re-entrant activation checkpointing; checkpoint with use_reentrant=False"
            )
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if name.startswith("feature_maps[") and tensors[0].ndim != 4:
            raise ConfigError(f"feature {name!r} is {shapes[0]}, not a map (B, C, H, W)")
        if len(set(shapes)) > 1:
            raise ConfigError(f"feature {name!r}: query, key and value are {shapes}, not of one width")
        if source.head:
            weight = full(unwrap(self.network).get_submodule(source.head).weight)
            if tensors[0].ndim != 4 or shapes[0][1] != weight.shape[1]:
                raise ConfigError(
                    f"feature {name!r}: the classifier has {weight.shape[1]} inputs and the last feature map is "
                    f"{shapes[0]}: its input is not the map's mean, so there are no class activation maps"
                )
            return torch.einsum("bdhw,cd->bchw", tensors[0].to(weight.dtype), weight)
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors, dim=2)


def depth(network: nn.Module, kind: str) -> int:
    """Return a network's number of layers of a kind: n of `hidden[1..n]`, or of `kind[0..n-1]`.

    Args:
        network: Any network; compiled and DDP-wrapped ones are looked into.
        kind: `hidden`, `attention`, `qkv` or `feature_maps`.

    Raises:
        ConfigError: It has none; the message lists what it has.
    """
    root = unwrap(network)
    available = feature_sources(root)
    if not (count := count_features(available, kind)):
        raise ConfigError(lacks(root, kind, available))
    return count - (kind == "hidden")


def _is_compiled(network: nn.Module) -> bool:
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in network.modules())


def _is_unchanged(put_out: Tensor, read: Tensor) -> bool:
    """Return True if a dropout's output was captured, unchanged by in-place modules in between."""
    return put_out is read and (read.is_inference() or read._version == 0)


def _first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of a module's input or output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, ModelOutput):
        return value.logits
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for item in values if (found := _first_tensor(item)) is not None), None)
