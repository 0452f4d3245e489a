"""A folder for `SentenceTransformer(FOLDER)`, written without that package and read without ours."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import nn

from kd_lightning.export.formats import Written
from kd_lightning.export.formats.huggingface import multiplied
from kd_lightning.export.graph import DTYPES, TEXT_INPUTS
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.embedding import FactorizedEmbedding
from kd_lightning.models.hf import PooledClassifier, Pooling
from kd_lightning.models.sentence_encoder import SentenceEncoder, sentence_encoder
from kd_lightning.models.static_embedding import StaticEmbedding
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.files import write_file
from kd_lightning.runtime.fingerprints import read_json

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "model.safetensors"
OF_PAIRS = "bi_encoder.json"
"""How `load` makes a score of two embeddings; that package takes their cosine, which is in the same order."""
_PAIRS = {"pad_token_id": int, "scale": int | float}
QUANTIZE = ("none", "fp16", "bf16")
NEEDS: tuple[str, ...] = ()
READS: tuple[str, ...] = ()
_MODES: dict[Pooling, str] = {"mean": "mean_tokens", "max": "max_tokens", "first": "cls_token"}
"""How that package calls a pooling; every version since 2 reads these keys."""
_IDENTITY = "torch.nn.modules.linear.Identity"


def check(model: TrainedModel) -> None:
    """Refuse what is not made of that package's modules."""
    network = _inside(model.network)
    embeds = model.task.embeds and isinstance(network, PooledClassifier)
    if not (embeds or isinstance(network, SentenceEncoder | StaticEmbedding)):
        raise ConfigError(
            f"--format sentence_transformers: {type(model.network).__name__} is not made of its modules; students of "
            "model@student=static_embedding, sentence_encoder, bi_encoder, from_teacher (of such a teacher) and "
            "transformer (student.pooling=mean) are where they embed texts; export others to safetensors, pt2, onnx"
        )


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Write each module where that package looks for it."""
    network: Any = copy.deepcopy(source.network).to(DTYPES[quantize])
    read = [name for name in TEXT_INPUTS if name in source.held_out[0]]
    if isinstance(network, BiEncoder):
        write_file(folder / OF_PAIRS, json.dumps(network.arguments))
        network = network.network
    elif isinstance(network, StaticEmbedding):
        read = ["input_ids", "attention_mask"]
    if isinstance(network, StaticEmbedding):
        save_file({"embedding.weight": network.embedding.weight.detach().contiguous()}, folder / FILE)
        _write_modules(folder, {"StaticEmbedding": None, "Normalize": {}})
        return Written(read)
    encoder: Any = network.encoder
    if isinstance(embedding := encoder.get_input_embeddings(), FactorizedEmbedding):
        encoder.set_input_embeddings(multiplied(embedding))
    encoder.config.dtype = DTYPES[quantize]
    encoder.save_pretrained(folder)
    limit = {"max_seq_length": source.model.max_length, "do_lower_case": False}
    write_file(folder / "sentence_bert_config.json", json.dumps(limit))
    width = encoder.config.hidden_size
    modes = {f"pooling_mode_{name}": mode == network.pooling for mode, name in _MODES.items()}
    modules: dict[str, dict[str, Any] | None] = {
        "Transformer": None, "Pooling": {"word_embedding_dimension": width, **modes},
    }  # fmt: skip
    if isinstance(linear := network.classifier, nn.Linear):
        sizes = {"in_features": width, "out_features": network.num_classes, "bias": True}
        modules["Dense"] = {**sizes, "activation_function": _IDENTITY}
    if isinstance(network, SentenceEncoder) and network.normalise:
        modules["Normalize"] = {}
    _write_modules(folder, modules)
    if isinstance(linear, nn.Linear):
        weights = {f"linear.{name}": value.detach().contiguous() for name, value in linear.state_dict().items()}
        save_file(weights, folder / "2_Dense" / FILE)
    return Written(read)


def _inside(network: nn.Module) -> nn.Module:
    """Return what embeds a text."""
    return network.network if isinstance(network, BiEncoder) else network


def _write_modules(folder: Path, modules: dict[str, dict[str, Any] | None]) -> None:
    """Write `modules.json`, and the configuration of each module that has a folder of its own."""
    listed = []
    for number, (kind, settings) in enumerate(modules.items()):
        place = "" if settings is None else f"{number}_{kind}"
        kinds = {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        listed.append(kinds)
        if settings is not None:
            (folder / place).mkdir()
            write_file(folder / place / "config.json", json.dumps(settings))
    write_file(folder / "modules.json", json.dumps(listed, indent=1))


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Load it as that package does; of a bi-encoder as what scores pairs."""
    whole = (folder / "config.json").is_file()
    network = sentence_encoder(str(folder)) if whole else _static(folder)
    if (folder / OF_PAIRS).is_file():
        network = _of_pairs(network, folder / OF_PAIRS)
    return network.eval()


def _of_pairs(network: nn.Module, path: Path) -> BiEncoder:
    """Return a bi-encoder with the settings of a file.

    Raises:
        KDError: It has others.
    """
    settings = read_json(path)
    fits = isinstance(settings, dict) and settings.keys() == _PAIRS.keys()
    if not fits or not all(isinstance(settings[name], kind) for name, kind in _PAIRS.items()):
        raise KDError(f"{path}: expected numbers for {' and '.join(_PAIRS)}: export it again")
    try:
        return BiEncoder(network, **settings)
    except ConfigError as error:
        raise KDError(f"{path}: {error}: export it again") from error


def _static(folder: Path) -> StaticEmbedding:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    weight = load_file(folder / FILE)["embedding.weight"].float()
    around = sorted(set(tokenizer("")["input_ids"]))
    network = StaticEmbedding(weight.shape[1], weight.shape[0], int(tokenizer.pad_token_id), around)
    network.load_state_dict({"embedding.weight": weight})
    return network
