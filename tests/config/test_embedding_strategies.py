"""Every file of conf/distillation for embeddings: two steps of training, a narrow student at two widths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.catalog import strategies
from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.data import EmbeddingFiles
from kd_lightning.losses.embedding_mse import EmbeddingMSELoss
from kd_lightning.losses.embedding_term import principal_directions
from kd_lightning.losses.pair_labels import PairLabelsLoss
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.pipeline.preflight import check_pairs
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.objective import Objective
from kd_lightning.types import ModelOutput
from tests.config.test_catalog import Gradients
from tests.toy_pairs import pairs, write_pairs

NAMES = [strategy.name for strategy in strategies(conf_dir() / "distillation") if "embedding" in strategy.models]
OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture
def data(tmp_path: Path, own_home: Path) -> EmbeddingFiles:
    return embedding_files(write_pairs(tmp_path / "pairs.jsonl"))


@pytest.fixture
def scored(tmp_path: Path, own_home: Path) -> EmbeddingFiles:
    """Pairs with scores of 0 to 5."""
    records = [{"query": q, "found": p, "like": n % 6} for n, (q, p) in enumerate(pairs())]
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return embedding_files(path, score_column="like", most_score=5)


def embedding_files(path: Path, **options: Any) -> EmbeddingFiles:
    found = EmbeddingFiles(
        train_file=str(path), text_column="query", positive_column="found", tokenizer="wordpiece:120", dimensions=6,
        widths=[4], batch_size=21, **options,
    )  # fmt: skip
    found.prepare()
    return found


def objective_of(name: str, composed: Callable[..., DictConfig], alpha: float) -> Objective:
    cfg = composed("data=embedding_files", "data.widths=[4]", f"alpha={alpha}")
    cfg.distillation = OmegaConf.load(conf_dir() / "distillation" / f"{name}.yaml")
    built: Objective = build(cfg.distillation)
    return built


def network(data: EmbeddingFiles, width: int) -> BiLSTM:
    sizes = {name: data.model_arguments("student")[name] for name in ("vocab_size", "pad_token_id")}
    return BiLSTM(width, embedding_size=8, hidden_size=8, **sizes)


def test_the_promised_ones_are_there() -> None:
    assert NAMES == ["embed_distill", "embedding_cosine", "embedding_mse", "margin_mse", "similarity_kl"]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, data: EmbeddingFiles, composed: Callable[..., DictConfig]) -> None:
    torch.manual_seed(0)
    objective = objective_of(name, composed, alpha=0.5)
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


def test_a_projector_starts_at_the_directions_of_the_drawn_texts(data: EmbeddingFiles) -> None:
    teacher = network(data, 10).eval()
    objective = Objective({"kd": EmbeddingMSELoss()}, {"kd": 1.0})
    still = partial(torch.optim.SGD, lr=0.0)
    module = DistillationModule(network(data, 6), FrozenTeacher(teacher), objective, still, task=data.task)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", num_sanity_val_steps=0, **OFF)
    trainer.fit(module, datamodule=data)
    expected = principal_directions(FrozenTeacher(teacher)(data.connecting_batch()).logits, 6)
    (projector,) = objective.terms["kd"].projectors  # type: ignore[misc, union-attr]
    torch.testing.assert_close(projector.weight.detach(), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["data", "scored"])
def test_baseline_and_distilled_learn_the_same_of_pairs(
    name: str, kind: str, request: pytest.FixtureRequest, composed: Callable[..., DictConfig]
) -> None:
    data = request.getfixturevalue(kind)
    batch = data.few()
    output = ModelOutput(network(data, 6)(batch["input_ids"], batch["attention_mask"]).logits)
    distilled, baseline = (
        term(output, output, batch) for term in (objective_of(name, composed, 0.5).terms["pairs"], data.task.loss())
    )
    assert distilled > 0
    assert torch.equal(distilled, baseline)


def test_a_distillation_without_anything_to_compare_is_refused(
    data: EmbeddingFiles, scored: EmbeddingFiles, tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    plain, held = tmp_path / "plain.txt", write_pairs(tmp_path / "held.jsonl")
    plain.write_text("\n".join(f"text {number}" for number in range(50)))
    single = embedding_files(plain, validation_file=str(held), test_file=str(held))
    for name in NAMES:
        for given in (data, scored, single):
            objective, teaches = objective_of(name, composed, 0.5), name != "margin_mse" or given is data
            with (
                nullcontext() if teaches else pytest.raises(ConfigError, match=r"distillation: kd .*data\.score_column")
            ):
                check_pairs(objective, given)
    labels = Objective({"pairs": data.task.loss(), "unused": EmbeddingMSELoss()}, {"pairs": 1.0, "unused": 0.0})
    check_pairs(labels, scored)
    with pytest.raises(ConfigError, match="distillation: pairs finds nothing to compare"):
        check_pairs(labels, single)


def test_the_baseline_learns_the_pairs(data: EmbeddingFiles) -> None:
    torch.manual_seed(0)
    module = SupervisedModule(network(data, 6), partial(torch.optim.AdamW, lr=0.02), task=data.task)
    assert all(isinstance(term, PairLabelsLoss) and term.widths == [4] for term in module.objective.terms.values())
    trainer = L.Trainer(max_steps=60, accelerator="cpu", num_sanity_val_steps=0, **OFF)
    trainer.validate(module, datamodule=data, verbose=False)
    untrained = float(trainer.callback_metrics["val/ndcg@10"])
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/ndcg@10"] > untrained + 0.1
