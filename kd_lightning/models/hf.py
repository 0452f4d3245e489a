"""Pretrained networks from Hugging Face, by name or folder, with a classifier on top."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from kd_lightning.models.spans import KIND, as_tokens
from kd_lightning.runtime.assets import PRETRAINED, fetch
from kd_lightning.runtime.errors import ConfigError, did_you_mean
from kd_lightning.runtime.gguf_files import folder_of, is_gguf
from kd_lightning.types import ModelOutput

Pooling = Literal["mean", "max", "first"]

log = logging.getLogger(__name__)


class PooledClassifier(nn.Module):
    """An encoder, a pooling of its hidden states over the words, dropout and a linear classifier.

    For encoders whose checkpoint was trained with another pooling than their classification class uses:
    all-MiniLM-L6-v2 is a mean-pooled sentence encoder. The encoder's own pooler is removed: it would be dead weight,
    and a parameter without a gradient under DDP.

    Args:
        encoder: A Hugging Face encoder (`AutoModel`): returns `last_hidden_state` of shape `(B, L, H)`.
        num_classes: Number of classes C.
        pooling: `mean` or `max` over the words, or the state of the `first` token.
        dropout: Probability of dropping an entry of the pooled vector.

    Raises:
        ConfigError: Unknown pooling.
    """

    VERSION = 1

    def __init__(self, encoder: nn.Module, num_classes: int, pooling: Pooling = "mean", dropout: float = 0.1) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ConfigError(f"pooling={pooling!r} is unknown{did_you_mean(str(pooling), get_args(Pooling))}")
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # type: ignore[assignment]
        self.encoder, self.num_classes, self.pooling = encoder, num_classes, pooling
        self.dropout = nn.Dropout(dropout)
        config: PreTrainedConfig = encoder.config  # type: ignore[assignment]
        linear = nn.Linear(config.hidden_size, num_classes)
        nn.init.normal_(linear.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(linear.bias)
        self.classifier: nn.Module = linear
        self._takes_segments = "token_type_ids" in inspect.signature(encoder.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ModelOutput:
        """Classify a batch of `(B, L)` token ids: logits `(B, C)`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        segments = {"token_type_ids": token_type_ids} if self._takes_segments else {}
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask, **segments).last_hidden_state
        return ModelOutput(self.classifier(self.dropout(self._pool(hidden, mask.ne(0).unsqueeze(2)))))

    def like(self, encoder: nn.Module, num_classes: int) -> PooledClassifier:
        """Return one around another encoder, for so many classes."""
        return PooledClassifier(encoder, num_classes, self.pooling, self.dropout.p)

    def _pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "max":
            return hidden.masked_fill(~valid, torch.finfo(hidden.dtype).min).amax(1)
        return (hidden * valid).sum(1) / valid.sum(1).clamp_min(1).to(hidden.dtype)


def pretrained(
    name: str,
    num_classes: int,
    pooling: Literal["checkpoint", "mean", "max", "first"] = "checkpoint",
    dropout: float = 0.1,
    attn_implementation: str | None = None,
    frozen_layers: int = 0,
    trust_remote_code: bool = False,
    pad_token_id: int | None = None,
    per_token: bool = False,
    spans: bool = False,
) -> nn.Module:
    """Load a pretrained encoder or a finished classifier, in float32 and training mode.

    A finished classifier for `num_classes` classes keeps its head; any other checkpoint gets a new one, which is
    logged.

    Args:
        name: The asset `minilm` (all-MiniLM-L6-v2), a folder, or a name on the Hugging Face hub. The first two never
            touch the network.
        num_classes: Number of classes.
        pooling: `checkpoint`: the head of `AutoModelForSequenceClassification` for this architecture (for BERT:
            first token, pooler, linear), or `AutoModelForImageClassification` to one of images. `mean`, `max`,
            `first`: a `PooledClassifier`.
        dropout: Before a `PooledClassifier`'s classifier; everything else keeps the checkpoint's dropout.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None: the fastest that is always there (sdpa).
        frozen_layers: Freeze the embeddings and this many of the lowest layers, which saves their backward pass and
            optimizer steps. 0: everything is trained.
        trust_remote_code: Run the Python files that the checkpoint brings; without it no prompt appears.
        pad_token_id: The id that shorter texts of a batch are filled up with. A decoder such as GPT-2 or Llama, which
            classifies at the last token that is another, takes it in place of its checkpoint's, which often has none.
            None: the checkpoint's.
        per_token: Classify each token, with the head that `AutoModelForTokenClassification` gives this architecture.
        spans: Its logits are of starts and ends of spans: only a network for question answering keeps its head.

    Returns:
        The Hugging Face model, or a `PooledClassifier` around it.

    Raises:
        ConfigError: No such folder or name, the hub cannot be reached, or the checkpoint cannot be a classifier.
    """
    choices = ("checkpoint", *get_args(Pooling))
    if pooling not in choices:
        raise ConfigError(f"pooling={pooling!r} is unknown{did_you_mean(str(pooling), choices)}")
    if per_token:
        check_unpooled(pooling, "checkpoint")
    check_attention(attn_implementation, "attn_implementation")
    source, local = locate(name)
    found: dict[str, Any] = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {**found, "dtype": torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with quiet_loading(hide_bar=local):
            config = read_config(source, name, found)
            if pooling != "checkpoint":
                encoder: PreTrainedModel = AutoModel.from_pretrained(source, **options)
                log.info("%s: new %s-pooled classification head for %d classes", name, pooling, num_classes)
                _pad_with(encoder, pad_token_id, name)
                _freeze(encoder, frozen_layers)
                return PooledClassifier(encoder, num_classes, pooling, dropout).train()
            kinds = _kinds(per_token, spans)
            keeps_head = _has_head(config, kinds) and config.num_labels == num_classes
            if not keeps_head:
                options |= {"num_labels": num_classes, "ignore_mismatched_sizes": True}
            auto = AutoModelForQuestionAnswering if spans and keeps_head else _classifier(config, per_token)
            network: Any = auto.from_pretrained(source, **options)
            if spans:
                network = as_tokens(network) if keeps_head else _with_fresh_head(network)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(
            cannot_load(name, "a token classifier" if per_token else "a classifier", local, error)
        ) from error
    _log_head(name, config, num_classes, kinds)
    _pad_with(network, pad_token_id, name)
    _freeze(network.base_model, frozen_layers)
    return network.train()  # type: ignore[no-any-return]  # from_pretrained leaves it in eval mode, and Lightning keeps the mode it finds


ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attentions of `transformers` itself. Any other name would be fetched from the hub as a kernel, which is code."""


def check_unpooled(pooling: str, default: str) -> None:
    """Refuse a pooling for a network that predicts for each token.

    Raises:
        ConfigError: Another than the default, which a configuration has without anybody's doing.
    """
    if pooling != default:
        raise ConfigError(f"pooling={pooling}: the data need a prediction for each token, and nothing is pooled")


def check_attention(given: Any, key: str) -> None:
    """Refuse an attention that is not part of `transformers`.

    Raises:
        ConfigError: Names the key.
    """
    if given is not None and given not in ATTENTIONS:
        raise ConfigError(f"{key}={given!r}: expected {', '.join(ATTENTIONS)} or null")


def check_attentions(settings: Any, where: str) -> None:
    """Refuse a `config.json` that names such an attention, for any part of a network."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            for one in value.values() if isinstance(value, dict) else [value]:
                check_attention(one, f"{where}: {key}")
        else:
            check_attentions(value, where)


def read_config(source: str, name: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Read a checkpoint's configuration, and refuse one that names an attention of elsewhere."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(source, **options)
    settings, _ = PreTrainedConfig.get_config_dict(source, local_files_only=options["local_files_only"])
    check_attentions(settings, f"config.json of {name!r}")
    return config


def layer_stack(network: PreTrainedModel) -> str:
    """Return the name of the encoder's list of layers: the largest with the config's number of modules."""
    sizes: dict[str, int] = {}
    for name, module in network.named_modules():
        is_stack = isinstance(module, nn.ModuleList) and len(module) == network.config.num_hidden_layers
        if is_stack and len({type(layer) for layer in module}) == 1:
            sizes[name] = sum(p.numel() for p in module.parameters())
    if not sizes:
        raise ConfigError(
            f"{type(network).__name__} has no list of {network.config.num_hidden_layers} equal layers to choose from "
            "(its layers may share weights): use another student, such as model@student=transformer"
        )
    return max(sizes, key=lambda name: sizes[name])


def _pad_with(network: nn.Module, pad_token_id: int | None, name: str) -> None:
    """Set the padding id of a network that classifies at a text's last token.

    All others use the mask, and their checkpoint's padding id may decide where their positions begin.
    """
    if pad_token_id is None:
        return
    rows = network.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if pad_token_id >= rows:
        raise ConfigError(
            f"name={name!r} has embeddings for {rows} tokens, and the data pad with token {pad_token_id}: use "
            f"the checkpoint's own tokenizer, data.tokenizer={name}, or give it the token and its embedding first"
        )
    if "pad_token_id" in inspect.unwrap(type(network).forward).__code__.co_names:
        network.config.get_text_config().pad_token_id = pad_token_id  # type: ignore[union-attr, operator]


def _freeze(encoder: PreTrainedModel, layers: int) -> None:
    if layers == 0:
        return
    stack = encoder.get_submodule(layer_stack(encoder))
    assert isinstance(stack, nn.ModuleList)
    if not 0 < layers <= len(stack):
        raise ConfigError(f"frozen_layers={layers}: the encoder has {len(stack)} layers")
    encoder.get_input_embeddings().requires_grad_(False)
    if (embeddings := getattr(encoder, "embeddings", None)) is not None:  # with positions and their normalisation
        embeddings.requires_grad_(False)
    for layer in stack[:layers]:
        layer.requires_grad_(False)


def finished(name: str, num_classes: int, pad_token_id: int | None = None, per_token: bool = False) -> nn.Module:
    """Load a finished classifier for this many classes, with its head; arguments as for `pretrained`.

    Raises:
        ConfigError: The checkpoint is an encoder, or a classifier for another number of classes: `pretrained` would
            give it a new, untrained head.
    """
    source, local = locate(name)
    try:
        config = read_config(source, name, {"local_files_only": local, "trust_remote_code": False})
    except (OSError, ValueError) as error:
        raise ConfigError(
            cannot_load(name, "a token classifier" if per_token else "a classifier", local, error)
        ) from error
    fits = _has_head(config, _kinds(per_token))
    if not fits or config.num_labels != num_classes:
        what, none = (
            ("token classifier", "no token classifier") if per_token else ("classifier", "an encoder without a head")
        )
        kind = f"a {what} for {config.num_labels} classes" if fits else none
        raise ConfigError(
            f"{name} is {kind}, not a finished teacher for the data's {num_classes} classes: to fine-tune it first, "
            f"use model@teacher.network=hf teacher.network.name={name} and no teacher.checkpoint"
        )
    return pretrained(name, num_classes, pad_token_id=pad_token_id, per_token=per_token)


def locate(name: str, key: str = "name", assets: Sequence[str] = PRETRAINED) -> tuple[str, bool]:
    """Return the name for `from_pretrained` and whether it is on this machine.

    Args:
        name: As for `pretrained`.
        key: The key that names it.
        assets: Those that fit, for messages.

    Raises:
        ConfigError: It is a path, but not a folder of a checkpoint.
    """
    if name in PRETRAINED:
        return str(fetch(name)), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{key}={name!r} is a folder without config.json: give one saved by save_pretrained()")
        return str(path), True
    if is_gguf(name):
        return str(folder_of(name)), True
    if path.is_file():
        raise ConfigError(f"{key}={name!r} is a file: give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        kinds = f"a folder, {', '.join(assets)} or a name on the Hugging Face hub"
        raise ConfigError(f"{key}={name!r}: no such folder; give {kinds}")
    return name, False


def _kinds(per_token: bool, spans: bool = False) -> tuple[str, ...]:
    """Return how the names of classes end whose head may be kept."""
    if spans:
        return (KIND,)
    return ("ForTokenClassification",) if per_token else ("ForSequenceClassification", "ForImageClassification")


def _has_head(config: PreTrainedConfig, kinds: tuple[str, ...]) -> bool:
    return any(str(name).endswith(kinds) for name in config.architectures or ())


def _classifier(config: PreTrainedConfig, per_token: bool) -> Any:
    """Return the auto class for this architecture: of images if it classifies nothing else."""
    if per_token:
        return AutoModelForTokenClassification
    of_images = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    of_texts = config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return AutoModelForImageClassification if of_images and not of_texts else AutoModelForSequenceClassification


def _with_fresh_head(network: PreTrainedModel) -> PreTrainedModel:
    """Draw the layers beyond the encoder anew: the checkpoint's classes are no starts and ends."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(f"{network.base_model_prefix}."):
            nn.init.normal_(module.weight, std=getattr(network.config, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)
    return network


def _log_head(name: str, config: PreTrainedConfig, num_classes: int, kinds: tuple[str, ...]) -> None:
    if not _has_head(config, kinds):
        log.info("%s: an encoder; new classification head for %d classes", name, num_classes)
    elif config.num_labels != num_classes:
        log.warning(
            "%s: a classifier for %d classes; its head is replaced by a new one for %d",
            name,
            config.num_labels,
            num_classes,
        )
    else:
        classes = ", ".join(map(str, (config.id2label or {}).values()))
        log.info("%s: a finished classifier; its head is kept, classes in this order: %s", name, classes)


def cannot_load(name: str, kind: str, local: bool, error: Exception) -> str:
    """Return the message for a checkpoint that is none of a kind, or is not there."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = "this folder" if local else "the Hugging Face hub (not reachable, or no such name)"
    return f"name={name!r} cannot be loaded as {kind} from {where}: {reason[:300]}"


@contextmanager
def quiet_loading(hide_bar: bool) -> Iterator[None]:
    """Hide the 'weights were not initialized' report in a block; `_log_head` logs one line instead.

    The progress bar of reading a local file goes too; that of a download stays.
    """
    verbosity = transformers_logging.get_verbosity()
    hide_bar = hide_bar and transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    if hide_bar:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if hide_bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
