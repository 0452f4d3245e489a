"""Every file of conf/distillation for embeddings: two steps of training, a narrow student at two widths."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.catalog import strategies
from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.data import EmbeddingFiles
from kd_lightning.losses.pairs import PairTerm
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from tests.config.test_catalog import Gradients
from tests.toy_pairs import write_pairs

NAMES = [strategy.name for strategy in strategies(conf_dir() / "distillation") if "embedding" in strategy.models]
OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture
def data(tmp_path: Path, own_home: Path) -> EmbeddingFiles:
    found = EmbeddingFiles(
        train_file=str(write_pairs(tmp_path / "pairs.jsonl")), text_column="query", positive_column="found",
        tokenizer="wordpiece:120", dimensions=6, widths=[4], batch_size=21,
    )  # fmt: skip
    found.prepare()
    return found


def network(data: EmbeddingFiles, width: int) -> BiLSTM:
    sizes = {name: data.model_arguments("student")[name] for name in ("vocab_size", "pad_token_id")}
    return BiLSTM(width, embedding_size=8, hidden_size=8, **sizes)


def test_the_promised_ones_are_there() -> None:
    assert NAMES == ["embed_distill", "embedding_cosine", "embedding_mse", "margin_mse", "similarity_kl"]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, data: EmbeddingFiles, composed: Callable[..., DictConfig]) -> None:
    torch.manual_seed(0)
    cfg = composed("data=embedding_files", "data.widths=[4]", "alpha=0.5")
    cfg.distillation = OmegaConf.load(conf_dir() / "distillation" / f"{name}.yaml")
    objective = build(cfg.distillation)
    teacher, student = network(data, 10).eval(), network(data, 6)
    module = DistillationModule(student, FrozenTeacher(teacher), objective, OPTIMIZER, task=data.task)
    module.connect(data.few(), data.num_examples)
    assert all(term.widths == [4] for term in objective.terms.values())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    gradients = Gradients()
    trainer = L.Trainer(max_steps=2, accelerator="cpu", num_sanity_val_steps=0, callbacks=[gradients], **OFF)
    trainer.fit(module, datamodule=data)
    assert len(gradients.losses) == 2
    assert all(map(math.isfinite, gradients.losses))
    assert any(total > 0 for key, total in gradients.sums.items() if key.startswith("student."))
    assert not [key for key, total in gradients.sums.items() if key.startswith("objective.") and total == 0]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    logged = trainer.callback_metrics
    assert {"val/ndcg@10", "val/ndcg@10/4", "val/spearman_to_teacher"} <= set(logged)
    assert "val/loss" not in logged  # no batch of single texts has whole pairs


def test_the_baseline_learns_the_pairs(data: EmbeddingFiles) -> None:
    torch.manual_seed(0)
    module = SupervisedModule(network(data, 6), partial(torch.optim.AdamW, lr=0.02), task=data.task)
    assert all(isinstance(term, PairTerm) and term.widths == [4] for term in module.objective.terms.values())
    trainer = L.Trainer(max_steps=60, accelerator="cpu", num_sanity_val_steps=0, **OFF)
    trainer.validate(module, datamodule=data, verbose=False)
    untrained = float(trainer.callback_metrics["val/ndcg@10"])
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/ndcg@10"] > untrained + 0.1
