"""What suits data, a goal or a network where nothing is set: networks, learning rates, precisions.

The rates are those of Adam and its relatives. They hold for the sets of docs/recipes.md; a network that is not listed
has `OTHER`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig

from kd_lightning.config.resolvers import fast_precision

NETWORKS: dict[str, tuple[str, dict[str, str]]] = {
    "text": ("minilm", {
        "small": "embeddings_from_teacher", "fast": "from_teacher", "accurate": "from_teacher",
    }),
    "tasks": ("minilm", dict.fromkeys(("small", "fast", "accurate"), "from_teacher")),
    "image": ("resnet", {"small": "cnn", "fast": "cnn", "accurate": "resnet_small"}),
    "embeddings": ("sentence_encoder", {
        "small": "static_embedding", "fast": "from_teacher", "accurate": "from_teacher",
    }),
    "ranking": ("minilm", dict.fromkeys(("small", "fast", "accurate"), "bi_encoder")),
    "corpus": ("causal_lm", dict.fromkeys(("small", "fast", "accurate"), "causal_lm_small")),
    "masks": ("masked_lm", {
        "small": "masked_lm_small", "fast": "masked_lm_from_teacher", "accurate": "masked_lm_from_teacher",
    }),
}  # fmt: skip
"""By what the data are: the choice of conf/model for the teacher, and those for the student by goal."""

OTHER_DATA = {
    "fashion_mnist": "image", "image_folder": "image", "lm_text": "corpus", "chat": "corpus",
    "chatterbot": "corpus", "sotu": "corpus", "multi_task": "tasks", "embedding_files": "embeddings",
    "debian_pairs": "embeddings", "general_text": "embeddings", "ranking_files": "ranking",
    "debian_ranking": "ranking", "masked_text": "masks", "general_documents": "masks",
}  # fmt: skip
"""The choices of conf/data that are no classification of texts."""

LAYERS = {"small": 0.5, "fast": 0.5, "accurate": 0.67}
"""The share of its teacher's layers that a student has, by goal."""


class Suited(NamedTuple):
    """What suits a network: a learning rate, and whether bfloat16 speeds its training up."""

    rate: float
    bfloat16: bool


OTHER = Suited(1e-3, False)
_MODELS = "kd_lightning.models"
PRETRAINED = f"{_MODELS}.hf.pretrained"
SUITED = {
    PRETRAINED: Suited(5e-5, True),
    f"{_MODELS}.causal_lm.causal_lm": Suited(5e-5, True),
    f"{_MODELS}.causal_lm.causal_lm_lora": Suited(2e-4, True),
    f"{_MODELS}.causal_lm.causal_lm_small": Suited(1e-3, True),
    f"{_MODELS}.causal_lm_from_teacher.causal_lm_from_teacher": Suited(3e-4, True),
    f"{_MODELS}.masked_lm.masked_lm": Suited(1e-4, True),
    f"{_MODELS}.masked_lm.masked_lm_small": Suited(1e-3, True),
    f"{_MODELS}.masked_lm_from_teacher.masked_lm_from_teacher": Suited(3e-4, True),
    f"{_MODELS}.from_teacher.from_teacher": Suited(3e-4, True),
    "kd_lightning.pipeline.from_run.from_run": Suited(3e-4, True),
    f"{_MODELS}.sentence_encoder.sentence_encoder": Suited(5e-5, True),
    f"{_MODELS}.bi_encoder_from_checkpoint.bi_encoder": Suited(5e-5, True),
    f"{_MODELS}.static_embedding.static_embedding": Suited(1e-3, False),
    f"{_MODELS}.transformer.transformer": Suited(1e-3, True),
    f"{_MODELS}.bilstm.BiLSTM": Suited(2e-3, False),
    f"{_MODELS}.text_cnn.TextCNN": Suited(2e-3, False),
    f"{_MODELS}.cnn.CNN": Suited(1e-2, True),
    f"{_MODELS}.cnn.ResNet": Suited(5e-3, True),
}
"""By a network's `_target_`; one around another network has that one's."""

OF_CHECKPOINTS = {"minilm": Suited(1e-4, True)}
"""By a pretrained network's name, where it is another than that of its `_target_`: MiniLM is narrow (384)."""


def of_reviews(*domains: str, _parent_: DictConfig) -> list[str]:
    """Return the transfer sets that only `data=reviews` has, and none for other data."""
    return list(domains) if str(_parent_.get("_target_")) == "kd_lightning.data.Reviews" else []


def network_for(role: str, data: str, goal: str) -> str:
    """Return the choice of conf/model for the teacher or the student of some data.

    >>> network_for("student", "text_files", "small"), network_for("teacher", "image_folder", "small")
    ('embeddings_from_teacher', 'resnet')
    """
    teacher, students = NETWORKS[OTHER_DATA.get(data, "text")]
    return teacher if role == "teacher" else students[goal]


def suited(network: Any) -> Suited:
    """Return what suits a network of these settings."""
    if not isinstance(network, Mapping | DictConfig):
        return OTHER
    inside = network.get("network")
    settings = inside if isinstance(inside, Mapping | DictConfig) else network
    target = str(settings.get("_target_"))
    checkpoint = str(settings.get("name")) if target == PRETRAINED else ""
    return OF_CHECKPOINTS.get(checkpoint) or SUITED.get(target, OTHER)


def suited_rate(*, _parent_: DictConfig) -> float:
    """Return the learning rate that suits the network which an optimizer's node is for."""
    owner: Any = _parent_._get_parent()
    return suited(owner.get("student" if "student" in owner else "network")).rate


def suited_precision(*, _root_: DictConfig) -> str:
    """Return the precision in which the student's training is fastest without a loss of accuracy."""
    return fast_precision() if suited(_root_.get("student")).bfloat16 else "32-true"
