"""Networks from their settings, the data's sizes and, where a student is made from it, the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_lightning.config.instantiate import build, lookup, parameters
from kd_lightning.config.schema import Node
from kd_lightning.data.text.tokens import encode_batch, load_tokenizer, tokenizer_differences, tokenizer_fingerprint
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.bi_encoder_from_checkpoint import bi_encoder
from kd_lightning.models.causal_lm import causal_lm, causal_lm_lora
from kd_lightning.models.causal_lm_from_teacher import causal_lm_from_teacher
from kd_lightning.models.fits import check_length
from kd_lightning.models.from_teacher import embeddings_from_teacher, from_teacher
from kd_lightning.models.hf import pretrained
from kd_lightning.models.masked_lm import masked_lm
from kd_lightning.models.masked_lm_from_teacher import masked_lm_from_teacher
from kd_lightning.models.onnx import OnnxNetwork
from kd_lightning.models.rebuild import describe
from kd_lightning.models.sentence_encoder import sentence_encoder
from kd_lightning.models.served import ServedLM
from kd_lightning.models.static_embedding import static_embedding
from kd_lightning.pipeline.from_run import from_run
from kd_lightning.runtime.assets import PRETRAINED
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import file_digest
from kd_lightning.teachers import EnsembleNetwork, SideBySide
from kd_lightning.training.run_folder import find_stage

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.data.datamodule import Role

FROM_TEACHER = (
    from_teacher, embeddings_from_teacher, causal_lm_from_teacher, masked_lm_from_teacher, static_embedding,
)  # fmt: skip
"""What makes students with the teacher's word embeddings."""


def build_network(
    settings: Node, data: IndexedData, role: Role, teacher: nn.Module | None = None
) -> tuple[nn.Module, Node]:
    """Build a network, and return with it the settings that rebuild it without the data.

    Args:
        settings: Its `_target_` and arguments.
        data: What it reads and predicts.
        role: Whose inputs it reads.
        teacher: What a student is made from that takes anything from the teacher.

    Raises:
        ConfigError: The settings do not fit the data, or the network could not be rebuilt.
    """
    check_vocabulary(settings, data, role)
    sizes, target = sizes_of(settings, data, role), settings["_target_"]
    given: dict[str, Any] = {"data": data} if lookup(target) is from_run else {}
    if role == "student" and takes_from_teacher(settings):
        assert teacher is not None
        given["teacher"] = source_of(teacher)
        if isinstance(given["teacher"], ServedLM | OnnxNetwork):
            raise ConfigError(
                f"student: {target} takes the teacher's weights, which a server or an ONNX file does not give; use "
                "another network, such as model@student=bilstm"
            )
        if lookup(target) in FROM_TEACHER:
            _check_tokens(data)
    takes = parameters(lookup(target))
    known = {**settings, **sizes, **given}
    if lacking := [name for name, (_, required) in takes.items() if required and name not in known]:
        raise ConfigError(f"{role}: {target} needs {', '.join(lacking)}; {type(data).__name__} gives {list(sizes)}")
    if "num_classes" in sizes and settings.get("num_classes") not in (None, classes := sizes["num_classes"]):
        wrong = settings["num_classes"]
        raise ConfigError(f"{role}: num_classes={wrong}, and the data have {classes}: leave it out")
    try:
        network: nn.Module = build(settings, **sizes, **given)
    except KDError as error:  # a constructor does not know whose network it makes
        raise type(error)(f"{role}: {error}") from error
    if "teacher" in takes and describe(network) is None:
        raise ConfigError(
            f"{role}: {target} makes a {type(network).__name__} from the teacher, which could not be "
            "rebuilt without it: give it a constructor of plain values, and copy weights in a script of your own"
        )
    check_reads(network, data, role)
    return network, filled(settings, data, role)


def check_reads(network: nn.Module, data: IndexedData, role: Role) -> None:
    """Refuse inputs that are longer than a network has positions, or that a bi-encoder cannot take apart.

    Raises:
        ConfigError: Names the key to change.
    """
    check_length(network, data.input_format.get("max_length"), role)
    if not any(isinstance(module, BiEncoder) for module in network.modules()):
        return
    tokenizer = data.tokenizer_of(role)
    if tokenizer is None or data.input_format.get("texts") != 2:
        raise ConfigError(f"{role}: a bi-encoder scores pairs of texts, which {type(data).__name__} does not have")
    encoded = encode_batch(tokenizer, [("a", "b")], 16)
    types = encoded.get("token_type_ids", torch.zeros(1, 1)).flatten().tolist()
    if types != sorted(types) or set(types) != {0, 1}:
        raise ConfigError(
            f"{role}: a bi-encoder takes query and document apart at their token types, 0 and then 1, and this "
            f"tokenizer gives a pair {types if 'token_type_ids' in encoded else 'none'}: use one of BERT's, such as "
            "data.tokenizer=minilm, or another network"
        )


def sizes_of(settings: Node, data: IndexedData, role: Role) -> dict[str, Any]:
    """Return a network's arguments from the data; a teacher of embeddings keeps a width of its own."""
    sizes = data.model_arguments(role) | ({"spans": True} if data.task.in_context else {})
    _, required = parameters(lookup(settings["_target_"])).get("num_classes", (None, False))
    if role == "teacher" and sizes.get("embeds") and (settings.get("num_classes") is not None or not required):
        del sizes["num_classes"]
    return sizes


def check_vocabulary(settings: Node, data: IndexedData, role: Role) -> None:
    """Refuse a pretrained language model that would read the data's tokens by other numbers than its own.

    Raises:
        ConfigError: Names the keys to change.
    """
    target = settings["_target_"]
    if lookup(target) not in (causal_lm, causal_lm_lora, masked_lm):
        return
    if data.task.kept is not None:
        raise ConfigError(
            f"{role}: {target.rpartition('.')[2]} has embeddings for {data.task.kept.size} tokens, of which "
            f"data.tokenizer=trimmed:NAME keeps {data.task.outputs}: set data.tokenizer=NAME, or choose a network that "
            f"is made anew (model@{'student' if role == 'student' else 'teacher.network'}=causal_lm_small)"
        )
    name, reader = settings["name"], data.tokenizer_of(role)
    if reader is None or not (name in PRETRAINED or any(Path(name).expanduser().glob("tokenizer*"))):
        return
    if differs := tokenizer_differences(load_tokenizer(str(Path(name).expanduser())), reader):
        raise ConfigError(
            f"{role}: name={name} has a tokenizer of its own, which differs from the data's in "
            f"{', '.join(differs)}: set data.tokenizer={name}, or choose another network"
        )


def filled(settings: Node, data: IndexedData, role: Role) -> Node:
    """Return a network's settings with what the data decide about it."""
    takes, sizes = parameters(lookup(settings["_target_"])), sizes_of(settings, data, role)
    return settings | {key: size for key, size in sizes.items() if key in takes and settings.get(key) is None}


def takes_from_teacher(settings: Node) -> bool:
    """Return whether a network of these settings is made from the teacher."""
    return "teacher" in parameters(lookup(settings["_target_"]))


def has_start(settings: Node) -> bool:
    """Return whether a network of these settings starts from trained weights, and could do without them."""
    takes = parameters(lookup(settings["_target_"]))
    return "initialise" in takes and settings.get("initialise", "teacher") == "teacher"


def starts_trained(settings: Node) -> bool:
    """Return whether a network of these settings starts from trained layers."""
    return lookup(settings["_target_"]) in (from_teacher, from_run, pretrained, sentence_encoder, bi_encoder)


def start_of(settings: Node) -> dict[str, str]:
    """Return what names the weights of another run that a network of these settings starts from, if any."""
    if lookup(settings["_target_"]) is not from_run or not has_start(settings):
        return {}
    return {"start": file_digest(find_stage(Path(settings["checkpoint"])) / "model.safetensors")}


def source_of(teacher: nn.Module) -> nn.Module:
    """Return the network that a student is built from: the first of several teachers."""
    while isinstance(teacher, EnsembleNetwork | SideBySide):
        teacher = teacher.members[0] if isinstance(teacher, EnsembleNetwork) else teacher.networks[0]
    return teacher


def _check_tokens(data: IndexedData) -> None:
    """Refuse a student with vectors of the tokens of a teacher that reads others."""
    readers = [data.tokenizer_of("student"), data.tokenizer_of("teacher")]
    prints = {tokenizer_fingerprint(reader) for reader in readers if reader is not None}
    if len(prints) > 1:
        raise ConfigError(
            "student: it has the teacher's word embeddings and would read other tokens: let both read with the "
            "teacher's tokenizer (data.tokenizer), or use a student that takes nothing from it"
        )
