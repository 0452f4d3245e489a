"""Finished run folders without a training: networks of random weights whose logits lie far apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from kd_lightning.data import (
    ImageFolder,
    IndexedData,
    LMTextData,
    MultiTaskData,
    Reviews,
    TextFiles,
)
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.causal_lm import CausalLM, causal_lm_small
from kd_lightning.models.cnn import CNN
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.fingerprints import write_json
from kd_lightning.training.run_folder import finish_stage, save_network
from tests.conftest import write_toy_csv
from tests.data.corpus.texts import made, written
from tests.data.images import write_folder
from tests.toy_reviews import write_tokenizer

TEXT = {"tokenizer": "wordpiece:400", "batch_size": 16, "eval_batch_size": 32, "max_length": 32}
MINILM = {"_target_": "kd_lightning.models.hf.pretrained", "name": "minilm"}


class Bag(nn.Module):
    """A user's network: reads no mask."""

    def __init__(self, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(vocab_size, num_classes, padding_idx=0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.bag(input_ids)


class Undecided(Bag):
    """What it does depends on what it reads: no graph can say that."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.bag(input_ids)
        return logits if float(logits.detach().sum()) > 0 else 2 * logits


class Exotic(Bag):
    """A graph, with an operation that ONNX does not have."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.bag(input_ids))


def write_run(folder: Path, data: IndexedData, settings: dict[str, Any], network: nn.Module, **more: Any) -> Path:
    """Write a run folder as kd-train leaves it, with a student and a teacher, the same network."""
    spread_out(network)
    for stage, role in (("seed_0/distill", "student"), ("teacher", "teacher")):
        task = {"class_names": data.class_names, "predicts": data.task.description, **data.input_format, "role": role}
        task["data"] = data.labelled
        save_network(folder / stage, network, more, task, data.tokenizer_of(role))
        how = {"batch_size": 16, "optimizer": {"lr": 0.1}, "network": MINILM if role == "teacher" else more}
        record = {"fingerprint": "f", "steps": 7, "settings": how}
        write_json(folder / stage / "settings.json", record)
        scores = {"validation": {data.task.monitor: 0.5}, "monitor": data.task.monitor, "mode": data.task.mode}
        finish_stage(folder / stage, {**record, "best_step": 7, **scores})
    config = {"name": folder.name, "data": settings, "temperature": 2.0, "alpha": 0.9, "stages": ["teacher", "distill"]}
    config["distillation"] = {"terms": {"ce": {}, "kd": {}}}
    teacher = {"teacher": {"checkpoint": None, "ema": None, "network": MINILM}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({**config, **teacher})), encoding="utf-8")
    return folder


def spread_out(network: nn.Module) -> None:
    """Draw all weights anew, the same ones each time, so large that no two logits are near each other."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.weight.normal_()
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
        for module in last:
            module.weight.normal_()


def text_data(folder: Path, pairs: bool = False) -> tuple[TextFiles, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"train_file": str(write_toy_csv(folder / "toy.csv")), **TEXT}
    if pairs:
        lines = (folder / "toy.csv").read_text(encoding="utf-8").splitlines()
        table = [lines[0] + ",other", *(f"{line},and what else" for line in lines[1:])]
        (folder / "toy.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
        options["text_pair_column"] = "other"
    data = TextFiles(**options)
    data.prepare()
    return data, {"_target_": "kd_lightning.data.TextFiles", **options}


def bilstm_run(folder: Path, **shape: Any) -> Path:
    data, settings = text_data(folder.parent)
    sizes = {"embedding_size": 16, "hidden_size": 16, **shape}
    return write_run(folder, data, settings, BiLSTM(**data.model_arguments("student"), **sizes))


def text_cnn_run(folder: Path) -> Path:
    data, settings = text_data(folder.parent)
    return write_run(folder, data, settings, TextCNN(**data.model_arguments("student"), embedding_size=16))


def pooled_run(folder: Path) -> Path:
    """A transformer that classifies by the mean of its states: no class of Hugging Face's."""
    data, settings = text_data(folder.parent)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "intermediate_size": 32, "max_length": 64}
    return write_run(folder, data, settings, transformer(**data.model_arguments("student"), **sizes, pooling="mean"))


def transformer_run(folder: Path, pairs: bool = False) -> Path:
    data, settings = text_data(folder.parent, pairs)
    sizes = {"hidden_size": 16, "num_layers": 2, "intermediate_size": 32, "max_length": 64}
    return write_run(folder, data, settings, transformer(**data.model_arguments("student"), **sizes))


def own_run(folder: Path, kind: type[Bag]) -> Path:
    data, settings = text_data(folder.parent)
    sizes = {name: value for name, value in data.model_arguments("student").items() if name != "pad_token_id"}
    target = {"_target_": f"tests.export.runs.{kind.__name__}"}
    return write_run(folder, data, settings, kind(**sizes), **target, **sizes)


def small_cnn(**sizes: Any) -> CNN:
    return CNN(**sizes, widths=[8, 16])


def cnn_run(folder: Path, make: Callable[..., nn.Module] = small_cnn, **format: Any) -> Path:
    images = write_folder(folder.parent / "images", {"train": 40})
    options: dict[str, Any] = {"folder": str(images), "image_size": 16, "eval_batch_size": 3, **format}
    data = ImageFolder(**options)
    data.prepare()
    settings = {"_target_": "kd_lightning.data.ImageFolder", **options}
    return write_run(folder, data, settings, make(**data.model_arguments("student")))


def regression_run(folder: Path) -> Path:
    """A transformer that rates sentences; `fetch` gives a toy archive."""
    options = _rated(folder.parent, "rating")
    data = Reviews(**options)
    data.prepare()
    sizes = {"hidden_size": 16, "num_layers": 2, "intermediate_size": 32, "max_length": 64}
    network = transformer(**data.model_arguments("student"), **sizes)
    return write_run(folder, data, {"_target_": "kd_lightning.data.Reviews", **options}, network)


def multi_task_run(folder: Path) -> Path:
    """A transformer that tells the domain of a sentence and rates it."""
    options = {labels: _rated(folder.parent, labels) for labels in ("domain", "rating")}
    data = MultiTaskData({labels: Reviews(**own) for labels, own in options.items()})
    data.prepare()
    sizes = {"hidden_size": 16, "num_layers": 2, "intermediate_size": 32, "max_length": 64}
    network = transformer(**data.model_arguments("student"), **sizes)
    tasks = {labels: {"_target_": "kd_lightning.data.Reviews", **own} for labels, own in options.items()}
    return write_run(folder, data, {"_target_": "kd_lightning.data.MultiTaskData", "tasks": tasks}, network)


def lm_run(
    folder: Path, make: Callable[[int], CausalLM] | None = None, network_settings: Any = None, **options: Any
) -> Path:
    """A small Llama, whose embeddings are its output layer and have rows that no token has; or another network."""
    given = {"tokenizer": "bpe:300", "block_size": 24, "batch_size": 4, **options}
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = str(written(folder.parent, made(60, words=(3, 30))))
    data = LMTextData(train_file=file, **given)
    data.prepare()
    settings = {"_target_": "kd_lightning.data.LMTextData", "train_file": file, **given}
    return write_run(folder, data, settings, (make or padded_llama)(data.task.outputs), **(network_settings or {}))


def padded_llama(size: int, **sizes: Any) -> CausalLM:
    given = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2, **sizes}
    return CausalLM(causal_lm_small(size + 3, 64, **given).network, size)


def _rated(folder: Path, labels: str) -> dict[str, Any]:
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    return {"labels": labels, **TEXT, "tokenizer": str(tokenizer)}
