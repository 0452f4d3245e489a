"""Every file of conf/distillation for rankings: two steps of training, on whole queries."""

from __future__ import annotations

import json
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
from kd_lightning.data import RankingFiles
from kd_lightning.losses.list_labels import ListLabelsLoss
from kd_lightning.models.bi_encoder import BiEncoder
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.static_embedding import StaticEmbedding
from kd_lightning.pipeline.preflight import check_pairs
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.evaluation import evaluate, of_network
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.objective import Objective
from tests.config.test_catalog import Gradients
from tests.toy_lists import lists, write_lists

NAMES = [strategy.name for strategy in strategies(conf_dir() / "distillation") if "ranking" in strategy.models]
OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


@pytest.fixture
def data(tmp_path: Path, own_home: Path) -> RankingFiles:
    return ranking_files(write_lists(tmp_path / "queries.jsonl"))


def ranking_files(path: Path) -> RankingFiles:
    found = RankingFiles(
        train_file=str(path), document_column="documents", grade_column="grades", tokenizer="wordpiece:120",
        batch_size=21, eval_batch_size=5,
    )  # fmt: skip
    found.prepare()
    return found


def objective_of(name: str, composed: Callable[..., DictConfig]) -> Objective:
    cfg = composed("data=ranking_files", "alpha=0.5")
    cfg.distillation = OmegaConf.load(conf_dir() / "distillation" / f"{name}.yaml")
    built: Objective = build(cfg.distillation)
    return built


def sizes_of(data: RankingFiles) -> dict[str, int]:
    return {name: data.model_arguments("student")[name] for name in ("vocab_size", "pad_token_id")}


def network(data: RankingFiles, width: int) -> BiLSTM:
    return BiLSTM(width, embedding_size=8, hidden_size=8, **sizes_of(data))


def test_the_promised_ones_are_there() -> None:
    assert NAMES == ["listwise_kl", "margin_mse_scores", "ranknet"]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, data: RankingFiles, composed: Callable[..., DictConfig]) -> None:
    torch.manual_seed(0)
    teacher, student = network(data, 1).eval(), BiEncoder(network(data, 6))
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = DistillationModule(
        student, FrozenTeacher(teacher), objective_of(name, composed), optimizer, task=data.task
    )
    module.connect(data.few(), data.num_examples)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    gradients = Gradients()
    trainer = L.Trainer(max_steps=2, accelerator="cpu", num_sanity_val_steps=0, callbacks=[gradients], **OFF)
    trainer.fit(module, datamodule=data)
    assert len(gradients.losses) == 2
    assert all(map(math.isfinite, gradients.losses))
    assert any(total > 0 for key, total in gradients.sums.items() if key.startswith("student."))
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert {"val/mrr@10", "val/ndcg@10", "val/spearman_to_teacher", "val/loss"} <= set(trainer.callback_metrics)


def test_the_baseline_learns_the_grades(data: RankingFiles) -> None:
    torch.manual_seed(0)
    student = BiEncoder(StaticEmbedding(8, **sizes_of(data)))
    module = SupervisedModule(student, partial(torch.optim.AdamW, lr=0.05), task=data.task)
    assert [type(term) for term in module.objective.terms.values()] == [ListLabelsLoss]

    def score() -> float:
        return evaluate(data.task, of_network(student), data.labelled_dataloader()).scores["mrr@10"]

    untrained = score()
    L.Trainer(max_steps=40, accelerator="cpu", num_sanity_val_steps=0, limit_val_batches=0, **OFF).fit(
        module, datamodule=data
    )
    assert score() > untrained + 0.2


def test_a_distillation_without_anything_to_compare_is_refused(
    data: RankingFiles, tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    alone = [
        {**record, "documents": record["documents"][:1], "grades": record["grades"][:1]} for record in lists()[:40]
    ]
    path, held = tmp_path / "alone.jsonl", write_lists(tmp_path / "held.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in alone))
    single = RankingFiles(
        train_file=str(path), validation_file=str(held), test_file=str(held), document_column="documents",
        grade_column="grades", tokenizer="wordpiece:120",
    )  # fmt: skip
    single.prepare()
    for name in NAMES:
        check_pairs(objective_of(name, composed), data)
        with pytest.raises(ConfigError, match=r"distillation: kd finds nothing to compare.* two documents or more"):
            check_pairs(objective_of(name, composed), single)
