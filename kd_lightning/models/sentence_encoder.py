"""Sentence encoders: a Hugging Face encoder, pooled, projected if need be, and scaled to length 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.utils.hub import cached_file

from kd_lightning.models.hf import (
    PooledClassifier,
    Pooling,
    cannot_load,
    check_attention,
    locate,
    quiet_loading,
    read_config,
)
from kd_lightning.runtime.assets import ENCODERS
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.types import ModelOutput

KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
"""The modules of sentence-transformers that are read; Dense without an activation."""
_MODES: dict[str, Pooling] = {"mean": "mean", "max": "max", "cls": "first"}
"""Pooling by the names of sentence-transformers."""


class SentenceEncoder(PooledClassifier):
    r"""An encoder whose output is the embedding of a text.

    .. math:: z = \frac{W \mathrm{pool}(h)}{\|W \mathrm{pool}(h)\|}

    with hidden states h of the words; where the embedding is as wide as these, there need be no W.

    Args:
        encoder: A Hugging Face encoder (`AutoModel`): returns `last_hidden_state` `(B, L, H)`.
        num_classes: D, how wide the embedding is.
        pooling: `mean` or `max` over the words, or the state of the `first` token.
        dropout: Probability of dropping an entry of the pooled vector.
        normalise: Scale embeddings to length 1.
        projects: Project an embedding that is as wide as the states, too; others always are.

    Raises:
        ConfigError: Unknown pooling.
    """

    VERSION = 1

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        pooling: Pooling = "mean",
        dropout: float = 0.0,
        normalise: bool = True,
        projects: bool = False,
    ) -> None:
        super().__init__(encoder, num_classes, pooling, dropout)
        config: PreTrainedConfig = encoder.config  # type: ignore[assignment]
        self.normalise = normalise
        self.projects = projects or num_classes != config.hidden_size
        if not self.projects:
            self.classifier = nn.Identity()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ModelOutput:
        """Embed a batch of `(B, L)` token ids: `(B, D)`."""
        output = super().forward(input_ids, attention_mask, token_type_ids)
        return ModelOutput(F.normalize(output.logits, dim=-1)) if self.normalise else output

    def like(self, encoder: nn.Module, num_classes: int) -> SentenceEncoder:
        """Return one around another encoder, with as many outputs."""
        return SentenceEncoder(encoder, num_classes, self.pooling, self.dropout.p, self.normalise, self.projects)


def sentence_encoder(
    name: str,
    num_classes: int | None = None,
    pooling: Literal["checkpoint", "mean", "max", "first"] = "checkpoint",
    dropout: float = 0.0,
    normalise: bool | None = None,
    attn_implementation: str | None = None,
) -> nn.Module:
    """Load an encoder as a sentence encoder, in float32 and training mode.

    Args:
        name: The asset `minilm` (all-MiniLM-L6-v2), a folder of `transformers` or of `sentence-transformers`, or a name
            on the Hugging Face hub. The first two never touch the network.
        num_classes: D, how wide the embedding is; another width than the checkpoint's gets a new projection. None: as
            wide as it is.
        pooling: `checkpoint`: as its `modules.json` has it, else `mean`; or `mean`, `max`, `first`.
        dropout: Probability of dropping an entry of the pooled vector.
        normalise: Scale embeddings to length 1; None: if its `modules.json` does, or there is none.
        attn_implementation: `sdpa`, `eager`, ...; None: the fastest that is always there (sdpa).

    Raises:
        ConfigError: No such folder or name, the hub cannot be reached, or modules that are none of `KINDS`.
    """
    choices = ("checkpoint", *get_args(Pooling))
    if pooling not in choices:
        raise ConfigError(f"pooling={pooling!r} is unknown{did_you_mean(pooling, choices)}")
    check_attention(attn_implementation, "attn_implementation")
    source, local = locate(name, assets=ENCODERS)
    found: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    options = found | ({} if attn_implementation is None else {"attn_implementation": attn_implementation})
    try:
        modules = _modules(source, name, local)
        place = modules["Transformer"]
        inside = {"subfolder": place} if place else {}
        with quiet_loading(hide_bar=local):
            config = read_config(str(Path(source, place)) if local else source, name, found)
            encoder = AutoModel.from_pretrained(source, **inside, **options, dtype=torch.float32)
        own = _pooling(source, modules["Pooling"], name) if "Pooling" in modules and pooling == "checkpoint" else "mean"
        weights = _dense(source, modules["Dense"], name) if "Dense" in modules else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ConfigError(cannot_load(name, "a sentence encoder", local, error)) from error
    width = config.hidden_size if weights is None else len(weights["weight"])
    kept = own if pooling == "checkpoint" else pooling
    scales = "Normalize" in modules if normalise is None else normalise
    network = SentenceEncoder(encoder, num_classes or width, kept, dropout, scales, weights is not None)
    if weights is not None and network.num_classes == width:
        network.classifier.load_state_dict(weights)
    return network.train()


def _file(source: str, name: str) -> Path | None:
    """Return a checkpoint's file, from its folder or the hub; None where it has none."""
    if Path(source).is_dir():
        return path if (path := Path(source, name)).is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _json(source: str, name: str) -> Any:
    path = _file(source, name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def _settings(source: str, place: str) -> Any:
    """Return the configuration of a module; its folder may be the checkpoint's own."""
    return _json(source, Path(place, "config.json").as_posix()) or {}


def _modules(source: str, name: str, local: bool) -> dict[str, str]:
    """Return the folders of a checkpoint's modules by kind; one of `transformers` is scaled, too.

    Raises:
        ConfigError: There are others than those that are read, or in another order.
    """
    listed = _json(source, "modules.json")
    if listed is None:
        return {"Transformer": "", "Normalize": ""}
    kinds = [str(module["type"]).rpartition(".")[2] for module in listed]
    if kinds[:1] != ["Transformer"] or kinds != [kind for kind in KINDS if kind in kinds]:
        raise ConfigError(
            f"{name}: modules.json has {', '.join(kinds)}; expected {', '.join(KINDS)}, in this order, Dense and "
            "Normalize where they are wanted"
        )
    for module in listed:
        if (place := Path(str(module["path"]))).is_absolute() or ".." in place.parts:
            raise ConfigError(f"{name}: modules.json names the folder {str(place)!r}, which is not inside of it")
    return {kind: str(module["path"]) for kind, module in zip(kinds, listed, strict=True)}


def _pooling(source: str, place: str, name: str) -> Pooling:
    """Return how a checkpoint of sentence-transformers pools.

    Raises:
        ConfigError: In another way than `Pooling` has.
    """
    settings = _settings(source, place)
    given = settings.get("pooling_mode")
    modes = [given] if isinstance(given, str) else given or [
        mode for mode, key in (("mean", "mean_tokens"), ("cls", "cls_token"), ("max", "max_tokens"))
        if settings.get(f"pooling_mode_{key}")
    ]  # fmt: skip
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ConfigError(f"{name}: it pools by {modes or settings}; expected one of {', '.join(_MODES)}")
    return _MODES[modes[0]]


def _dense(source: str, place: str, name: str) -> dict[str, Tensor]:
    """Return weight and bias of a checkpoint's projection.

    Raises:
        ConfigError: It has an activation, or its weights are not there as safetensors.
    """
    settings, weights = _settings(source, place), _file(source, Path(place, "model.safetensors").as_posix())
    activation = str(settings.get("activation_function", "torch.nn.modules.linear.Identity"))
    if not activation.endswith(".Identity") or weights is None:
        raise ConfigError(
            f"{name}: its Dense has the activation {activation.rpartition('.')[2]}, and {weights or 'no safetensors'}; "
            "expected none, and a model.safetensors"
        )
    found = {key.removeprefix("linear."): value.float() for key, value in load_file(weights).items()}
    return {"bias": torch.zeros(len(found["weight"])), **found}
