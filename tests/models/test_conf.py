from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from torch import nn

from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.models.masked_lm import masked_lm_small
from kd_lightning.pipeline.resolvers import register_resolvers
from tests import ROOT
from tests.models.test_timm import stand_in
from tests.models.tiny import VOCABULARY, batch, tiny
from tests.pipeline.test_from_run import write_student

FOLDER = ROOT / "conf" / "model"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "custom")  # the user names its target
FILLED_IN = {
    "num_classes",
    "vocab_size",
    "block_size",
    "pad_token_id",
    "channels",
    "teacher",
    "per_token",
    "embeds",
    "data",
}
FILLED_IN |= {"special_tokens", "single_token", "spans"}
IMAGES = {"pixel_values": torch.zeros(2, 1, 8, 8)}
VISION = ("cnn", "resnet", "resnet_small", "timm", "simkd_cnn")
LANGUAGE = ("causal_lm", "causal_lm_lora", "causal_lm_small", "causal_lm_from_teacher", "smollm2", "gemma3_270m")
MASKED = ("masked_lm", "masked_lm_small", "masked_lm_from_teacher")
__all__ = ["stand_in"]  # a fixture: timm is not installed


def test_the_promised_models_are_there() -> None:
    names = {
        "minilm",
        "hf",
        "transformer",
        "bilstm",
        "embeddings_from_teacher",
        "text_cnn",
        "from_run",
        "from_teacher",
        "lstm_teacher",
        "lstm_student",
        "cnn",
        "resnet",
        "timm",
        *LANGUAGE,
        *MASKED,
    }
    assert names <= {path.stem for path in FILES}


def composed(path: Path) -> Any:
    """A file, with those in it that its defaults list names."""
    register_resolvers()
    node: Any = OmegaConf.load(path)
    for entry in node.pop("defaults", []):
        if entry != "_self_":
            ((place, name),) = entry.items()
            key = place.rpartition("@")[2]
            node[key] = OmegaConf.merge(OmegaConf.load(FOLDER / f"{name}.yaml"), node[key])
    return node


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keys_are_the_signature_each_with_a_comment(path: Path) -> None:
    node = composed(path)
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    assert set(parameters) - FILLED_IN <= set(node) - {"_target_"} <= set(parameters)
    lines = path.read_text().splitlines()
    assert all(lines[i - 1].startswith("# ") for i, line in enumerate(lines) if not line.startswith(("#", " ")))
    for name in FILLED_IN & set(parameters):
        assert any(line.startswith("#") and name in line for line in lines), f"{name} is not mentioned"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in LANGUAGE + MASKED], ids=lambda path: path.stem
)
def test_builds_and_runs(path: Path, tmp_path: Path) -> None:
    node = composed(path)
    teacher = tiny("bert", 3)
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    data = {"num_classes": 3, "channels": 1} if path.stem in VISION else {"num_classes": 3, "vocab_size": VOCABULARY}
    data |= {"pad_token_id": 1, "teacher": teacher}
    given = {name: value for name, value in data.items() if name in parameters}
    if "name" in node.keys():  # noqa: SIM118 (a missing value is not "in" the node)
        teacher.bert.save_pretrained(tmp_path)
        node["name"] = "resnet18" if path.stem in VISION else str(tmp_path)
    if path.stem == "from_run":
        node["checkpoint"] = str(write_student(tmp_path / "run", BiLSTM(3, VOCABULARY, embedding_size=4)))
    if "network" in node:
        node.network.embedding_size = 8  # the tiny teacher is not wider
    network = instantiate(node, **given, _convert_="all")
    assert isinstance(network, nn.Module)
    outputs = 1 if path.stem == "bi_encoder" else 3
    assert run_network(network, IMAGES if path.stem in VISION else batch()).logits.shape == (2, outputs)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_build_and_run(name: str, tmp_path: Path) -> None:
    node = composed(FOLDER / f"{name}.yaml")
    if "name" in list(node):
        causal_lm_small(VOCABULARY, 8, 8, 1, 2).network.save_pretrained(tmp_path)
        node["name"] = str(tmp_path)
    given = {"teacher": causal_lm_small(VOCABULARY, 8, 8, 4, 2)} if name == "causal_lm_from_teacher" else {}
    network = instantiate(node, vocab_size=VOCABULARY, block_size=8, _convert_="all", **given)
    assert run_network(network, batch()).logits.shape == (2, 5, VOCABULARY)


@pytest.mark.parametrize("name", MASKED)
def test_masked_language_models_build_and_run(name: str, tmp_path: Path) -> None:
    node = composed(FOLDER / f"{name}.yaml")
    small = masked_lm_small(VOCABULARY, 8, hidden_size=8)
    if "name" in list(node):
        small.network.save_pretrained(tmp_path)
        node["name"] = str(tmp_path)
    given = {"teacher": small} if name == "masked_lm_from_teacher" else {}
    network = instantiate(node, vocab_size=VOCABULARY, block_size=8, _convert_="all", **given)
    places = {"masked_places": torch.tensor([[1], [2]])}
    assert run_network(network, batch() | places).logits.shape == (2, 1, VOCABULARY)


def test_the_reference_pair() -> None:
    sizes = [OmegaConf.load(FOLDER / f"{name}.yaml") for name in ("lstm_teacher", "lstm_student")]
    assert [(node["num_layers"], node["hidden_size"]) for node in sizes] == [(2, 128), (2, 64)]
