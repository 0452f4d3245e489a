"""A folder for `from_pretrained` and `pipeline` of `transformers`, without our code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from kd_lightning.export.formats import Written
from kd_lightning.export.graph import DTYPES, TEXT_INPUTS
from kd_lightning.export.step import set_ends
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.causal_lm import CausalLM
from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.models.hf import PooledClassifier
from kd_lightning.models.masked_lm import MaskedLM
from kd_lightning.models.sentence_encoder import SentenceEncoder
from kd_lightning.models.static_embedding import StaticEmbedding
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import task_of

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.safetensors"
QUANTIZE = ("none", "fp16", "bf16")
NEEDS: tuple[str, ...] = ()
READS: tuple[str, ...] = ()


def check(model: TrainedModel) -> None:
    """Refuse what no class of `transformers` is, and several tasks, which its pipelines lack."""
    network = model.network
    if isinstance(network, CausalLM | MaskedLM):
        return
    if model.task.tasks:
        raise ConfigError(
            f"--format huggingface: this student has {len(model.task.tasks)} tasks ({', '.join(model.task.tasks)}), "
            "and from_pretrained supports only one; use safetensors, pt2, onnx"
        )
    embeds = model.task.embeds and isinstance(network, PooledClassifier)
    if embeds or isinstance(network, SentenceEncoder | StaticEmbedding | BiEncoder):
        raise ConfigError("--format huggingface: this student embeds texts; use --format sentence_transformers")
    if isinstance(network, PooledClassifier):
        raise ConfigError(
            f"--format huggingface: no class of transformers has this student's pooling={network.pooling}; train one "
            "with student.pooling=bert (transformer) or checkpoint (hf, minilm), or export to safetensors, pt2, onnx"
        )
    if not isinstance(network, PreTrainedModel) or not _is_classifier(network):
        raise ConfigError(
            f"--format huggingface: {type(network).__name__} is not a classifier of transformers, so "
            "from_pretrained could not load it; use safetensors, pt2, onnx"
        )
    try:
        model.task.published(unfactorised(copy.deepcopy(network)))
    except ConfigError as error:
        raise ConfigError(f"--format huggingface: {error}; use safetensors, pt2, onnx") from error


def _is_classifier(network: nn.Module) -> bool:
    kinds = ("ForSequenceClassification", "ForImageClassification", "ForTokenClassification")
    return type(network).__name__.endswith(kinds)


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Write with `save_pretrained`, with the class names in the config."""
    network: Any = copy.deepcopy(source.network).to(DTYPES[quantize])
    if isinstance(network, CausalLM):
        network = network.network
        set_ends(network.config, network.generation_config, source.model.tokenizer)
    network = unfactorised(network.network if isinstance(network, MaskedLM) else network)
    if names := source.model.class_names:
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {name: number for number, name in enumerate(names)}
        network.config.problem_type = source.model.task.problem_type  # otherwise pipelines apply a sigmoid to scores
    if source.model.task.pipeline("text") == "text-ranking":  # else that package applies a sigmoid to one score
        network.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    network.config.dtype = DTYPES[quantize]
    network = source.model.task.published(network)
    network.save_pretrained(folder)
    return Written([name for name in (*TEXT_INPUTS, "pixel_values") if name in source.held_out[0]])


def unfactorised(network: Any) -> Any:
    """Return the network, with the full table of a factorised embedding."""
    embedding = network.get_input_embeddings()
    if isinstance(embedding, FactorizedEmbedding):
        network.set_input_embeddings(multiplied(embedding))
    return network


def multiplied(embedding: FactorizedEmbedding) -> nn.Embedding:
    """Return the full table of a factorised one, which no class of `transformers` has."""
    with torch.no_grad():
        full = embedding.table.weight @ embedding.projection.weight.T
    rows, width = full.shape
    return nn.Embedding(rows, width, padding_idx=embedding.table.padding_idx, _weight=full)


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Load it with `from_pretrained`."""
    network: Any
    if exported.images is not None:
        kind: Any = AutoModelForImageClassification
        network = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    else:
        sizes = {} if exported.pad_token_id is None else {"pad_token_id": exported.pad_token_id}
        network = task_of(exported.predicts).as_published(str(folder), sizes)
    return network.eval()  # type: ignore[no-any-return]
