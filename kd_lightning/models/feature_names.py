"""The features that a network has, by their neutral names (`features`), and where each comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from kd_lightning.runtime.errors import ConfigError, did_you_mean

_INDEXED = re.compile(r"(\w+)\[(-?\d+)\]")
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
)


@dataclass(frozen=True)
class FeatureSource:
    """Where a feature comes from.

    Attributes:
        modules: Names of the modules; several outputs are stacked.
        what: Their output or input (`undropped`: without the dropout in front), the second part of an attention's
            output, or a tuple in the output of a Hugging Face network whose layers are not separate modules.
        position: In that tuple.
        head: Name of a linear layer that is applied, without its bias, at each place of the feature; "" for none.
    """

    modules: tuple[str, ...]
    what: Literal["output", "input", "undropped", "attention", "hidden_states", "attentions"] = "output"
    position: int = 0
    head: str = ""


def feature_sources(root: nn.Module) -> dict[str, FeatureSource]:
    """Return every neutral feature name of a network, and where the feature comes from.

    Raises:
        ConfigError: Its modules output nothing of the batch's rows, or it names what is no module.
    """
    _, closed = _outermost(root, lambda m: getattr(m, "feature_names", None) == {})
    if closed is not None:
        raise ConfigError(
            f"{type(closed).__name__} has no features: its modules see other rows than the batch has; compare its "
            "output alone"
        )
    linear = [  # quantised ones, too
        path
        for path, m in root.named_modules()
        if isinstance(getattr(m, "in_features", None), int) and hasattr(m, "weight")
    ]
    pooled = {"pooled": FeatureSource((linear[-1],), "undropped")} if linear else {}
    found = {**_of_transformer(root), **_of_stages(root), **pooled, **_of_own_names(root)}
    stages = count_features(found, "feature_maps")
    if stages and linear and isinstance(root.get_submodule(linear[-1]), nn.Linear):
        found.setdefault("cam", FeatureSource(found[f"feature_maps[{stages - 1}]"].modules, head=linear[-1]))
    return found


def _of_own_names(root: nn.Module) -> dict[str, FeatureSource]:
    """Return the features named by the outermost module with `feature_names`."""
    prefix, owner = _outermost(root, lambda m: isinstance(getattr(m, "feature_names", None), Mapping))
    if owner is None:
        return {}
    names: Any = owner.feature_names
    modules = [path for path, _ in owner.named_modules()]
    for name, path in names.items():
        if path not in modules:
            hint = did_you_mean(path, modules)
            raise ConfigError(f"{type(owner).__name__}.feature_names: {name} is {path!r}, not a module of it{hint}")
    sources = {name: FeatureSource((_joined(prefix, path),)) for name, path in names.items()}
    for kind in {match[1] for name in sources if (match := _INDEXED.fullmatch(name))}:
        missing = [i for i in range(count_features(sources, kind)) if f"{kind}[{i}]" not in sources]
        if missing:
            raise ConfigError(f"{type(owner).__name__}.feature_names: {kind}[{missing[0]}] is missing")
    return sources


def _of_transformer(root: nn.Module) -> dict[str, FeatureSource]:
    """Return the names of the outermost Hugging Face network with one stack of layers."""
    prefix, encoder = outermost_transformer(root)
    if encoder is None:
        return {}
    count = _layers(encoder)
    if layers := _recorded(prefix, encoder, "hidden_states"):
        hidden = [FeatureSource((layers[0],), "input"), *(FeatureSource((path,)) for path in layers)]
    else:
        hidden = [FeatureSource((prefix,), "hidden_states", i) for i in range(count + 1)]
    if attentions := _recorded(prefix, encoder, "attentions"):
        probabilities = [FeatureSource((path,), "attention") for path in attentions]
    else:
        probabilities = [FeatureSource((prefix,), "attentions", i) for i in range(count)]
    projections = [
        FeatureSource(tuple(_joined(prefix, _joined(path, child)) for child in children))
        for path, module in encoder.named_modules()
        for children in _PROJECTIONS
        if all(isinstance(getattr(module, child, None), nn.Module) for child in children)
    ]
    if len(projections) != count:  # layers share them, or attend to something else as well
        projections = []
    kinds = {"hidden": hidden, "attention": probabilities, "qkv": projections}
    sources = {f"{kind}[{i}]": source for kind, found in kinds.items() for i, source in enumerate(found)}
    return {**sources, "embeddings": hidden[0]}


def outermost_transformer(root: nn.Module) -> tuple[str, nn.Module | None]:
    """Return the outermost Hugging Face network with one stack of layers, known by its methods."""
    return _outermost(root, lambda m: hasattr(m, "set_attn_implementation") and _layers(m) > 0)


def _recorded(prefix: str, encoder: nn.Module, what: str) -> list[str]:
    """Return the modules whose outputs have hidden states or attentions, one in each layer.

    Its own hooks are local functions, which cannot be pickled and break a compiled graph.
    """
    kind = (getattr(encoder, "_can_record_outputs", None) or {}).get(what)
    if not isinstance(kind, type):
        return []
    paths = [_joined(prefix, path) for path, module in encoder.named_modules() if isinstance(module, kind)]
    return paths if len(paths) == _layers(encoder) else []


def _of_stages(root: nn.Module) -> dict[str, FeatureSource]:
    """Return the feature maps of a convolutional network of timm, Hugging Face or torchvision."""
    prefix, owner = _outermost(root, lambda m: bool(_stages(m)))
    if owner is None:
        return {}
    outputs = [FeatureSource((_joined(prefix, path),)) for path in _stages(owner)]
    if not (hasattr(owner, "patch_embed") and hasattr(owner, "blocks")):
        return {f"feature_maps[{i}]": source for i, source in enumerate(outputs)}
    hidden = [FeatureSource((_joined(prefix, "blocks.0"),), "input"), *outputs]  # a vision transformer of timm: tokens
    return {**{f"hidden[{i}]": source for i, source in enumerate(hidden)}, "embeddings": hidden[0]}


def _stages(module: nn.Module) -> list[str]:
    """Return the names of the modules that output feature maps; none if unknown."""
    info = getattr(module, "feature_info", None)
    if isinstance(info, list):  # timm's; in some of its networks the channels come last
        return [item["module"] for item in info] if getattr(module, "output_fmt", "NCHW") == "NCHW" else []
    stages = getattr(module, "stages", None)
    if isinstance(stages, nn.ModuleList | nn.Sequential):
        return [f"stages.{i}" for i in range(len(stages))]
    numbered = [name for name, _ in module.named_children() if re.fullmatch(r"layer[1-9]", name)]
    return sorted(numbered) if len(numbered) > 1 else []


def _layers(module: nn.Module) -> int:
    """Return the number of layers of a Hugging Face network; 0 where there are two stacks, or none."""
    config: Any = module.config
    return 0 if config.is_encoder_decoder else int(getattr(config, "num_hidden_layers", 0))


def _outermost(root: nn.Module, test: Callable[[nn.Module], bool]) -> tuple[str, nn.Module | None]:
    return next(((path, module) for path, module in root.named_modules() if test(module)), ("", None))


def _joined(prefix: str, path: str) -> str:
    return f"{prefix}.{path}".strip(".")


def find_feature(name: str, available: dict[str, FeatureSource], root: nn.Module) -> FeatureSource:
    """Return where a feature comes from: a module by its name, or one of the neutral names.

    Raises:
        ConfigError: The network has none of this name.
    """
    modules = [path for path, _ in root.named_modules() if path]
    if name in modules:
        return FeatureSource((name,))
    if name in available:
        return available[name]
    if (match := _INDEXED.fullmatch(name)) and (count := count_features(available, match[1])):
        kind, position = match[1], int(match[2])
        if not -count <= position < count:
            what = f"{count} stages" if kind == "feature_maps" else f"{count - (kind == 'hidden')} layers"
            raise ConfigError(
                f"feature {name!r}: {type(root).__name__} has {what}; {kind}[i] takes i from {-count} to {count - 1}"
            )
        return available[f"{kind}[{position + count}]"]
    if match and match[1] in ("hidden", "attention", "qkv", "feature_maps"):
        raise ConfigError(f"feature {name!r}: {lacks(root, match[1], available)}")
    hint = did_you_mean(name, [*modules, *available])
    if hint.startswith("; valid"):  # no similar name: the list of all modules would be too long
        hint = did_you_mean(name, [path for path in [*modules, *available] if "." not in path])
    raise ConfigError(f"feature {name!r}: {type(root).__name__} has none of this name{hint}")


def count_features(available: Mapping[str, Any], kind: str) -> int:
    """Return the number of features of a kind, one more than the largest index."""
    matches = (_INDEXED.fullmatch(name) for name in available)
    return max((int(match[2]) + 1 for match in matches if match and match[1] == kind), default=0)


def lacks(root: nn.Module, kind: str, available: dict[str, FeatureSource]) -> str:
    """Return in words that a network has no features of a kind, and which ones it has."""
    kinds = dict.fromkeys(match[1] if (match := _INDEXED.fullmatch(name)) else name for name in available)
    has = [f"{k}[0..{n - 1}]" if (n := count_features(available, k)) else k for k in kinds]
    return f"{type(root).__name__} has no {kind}[i]; it has {', '.join([*has, 'its modules by their names'])}"
