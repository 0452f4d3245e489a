"""Every file of conf/distillation for spans: two steps of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.catalog import strategies
from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.data import QuestionFiles
from kd_lightning.losses.span_labels import span_labels
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import QuestionAnswering
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.objective import Objective
from kd_lightning.types import ModelOutput
from tests.config.test_catalog import Gradients
from tests.toy_questions import records, write_jsonl

NAMES = [strategy.name for strategy in strategies(conf_dir() / "distillation") if "spans" in strategy.models]
OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def test_the_promised_ones_are_there() -> None:
    assert NAMES == ["span_labels", "span_soft_target"]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, tmp_path: Path, own_home: Path, composed: Callable[..., DictConfig]) -> None:
    data = QuestionFiles(
        train_file=str(write_jsonl(tmp_path / "qa.jsonl", records(60))), tokenizer="wordpiece:120", max_length=40,
        stride=8, max_question_length=12, batch_size=16,
    )  # fmt: skip
    data.prepare()
    sizes: Any = data.model_arguments("student")
    student, teacher = (BiLSTM(embedding_size=8, hidden_size=8, **sizes) for _ in range(2))
    cfg = composed("data=question_files", "alpha=0.5")
    cfg.distillation = OmegaConf.load(conf_dir() / "distillation" / f"{name}.yaml")
    objective: Objective = build(cfg.distillation)
    plain = QuestionAnswering(**{k: v for k, v in data.task.settings.items() if k != "_target_"})  # as kd-cli builds it
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = DistillationModule(student, FrozenTeacher(teacher), objective, optimizer, task=plain)
    module.connect(data.few(), data.num_examples)
    gradients = Gradients()
    trainer = L.Trainer(max_steps=2, accelerator="cpu", num_sanity_val_steps=0, callbacks=[gradients], **OFF)
    trainer.fit(module, datamodule=data)
    assert all(map(math.isfinite, gradients.losses))
    assert all(total > 0 for key, total in gradients.sums.items() if key.startswith("student."))
    trainer.validate(module, datamodule=data, verbose=False)
    logged = trainer.callback_metrics
    assert {"val/f1", "val/exact_match", "val/agreement", "val/kl_to_teacher", "val/loss"} <= set(logged)
    assert all(value.isfinite() for value in logged.values())


def test_the_loss_of_validation_is_a_mean_over_windows(tmp_path: Path, own_home: Path) -> None:
    data = QuestionFiles(
        train_file=str(write_jsonl(tmp_path / "qa.jsonl", records(60))), tokenizer="wordpiece:120", max_length=40,
        stride=8, max_question_length=12, batch_size=16, eval_batch_size=3,
    )  # fmt: skip
    data.prepare()
    sizes: Any = data.model_arguments("student")
    network = BiLSTM(embedding_size=8, hidden_size=8, **sizes).eval()
    module = SupervisedModule(network, partial(torch.optim.AdamW, lr=1e-3), task=data.task)
    (scores,) = L.Trainer(accelerator="cpu", **OFF).validate(module, datamodule=data, verbose=False)
    with torch.inference_mode():
        values = [
            span_labels(run_network(network, batch).logits, batch["labels"], batch["keep"], "none")
            for batch in data.val_dataloader()
        ]
    assert scores["val/loss"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)


def test_all_others_that_compare_logits_are_refused(composed: Callable[..., DictConfig]) -> None:
    cfg, generator = composed("data=question_files", "alpha=0.5"), torch.Generator().manual_seed(0)
    student, teacher = (ModelOutput(torch.randn(2, 5, 2, generator=generator)) for _ in range(2))
    keep = torch.ones(2, 5, dtype=torch.bool)
    batch = {"labels": torch.zeros(2, 5, dtype=torch.long), "keep": keep, "attention_mask": keep.long(),
             "question": torch.arange(2), "index": torch.arange(2)}  # fmt: skip
    seen = {}
    for strategy in strategies(conf_dir() / "distillation"):
        cfg.distillation = OmegaConf.load(conf_dir() / "distillation" / f"{strategy.name}.yaml")
        objective: Objective = build(cfg.distillation)
        if strategy.name in NAMES or objective.needs_student or objective.needs_teacher:
            continue
        for name, term in objective.terms.items():
            with pytest.raises((ValueError, KeyError)) as caught:
                term(student, teacher, batch)
            seen[f"{strategy.name}.{name}"] = str(caught.value)
    for name in ("regression.kd", "soft_target.ce", "logit_mse.kd"):
        assert "distillation=span_soft_target" in seen[name]


def test_a_task_without_texts_needs_data_with_the_same(tmp_path: Path, own_home: Path) -> None:
    data = QuestionFiles(
        train_file=str(write_jsonl(tmp_path / "qa.jsonl", records(60))), tokenizer="wordpiece:120", max_length=40,
        stride=8, max_question_length=12,
    )  # fmt: skip
    data.prepare()
    sizes: Any = data.model_arguments("student")
    network = BiLSTM(embedding_size=8, hidden_size=8, **sizes)
    for task, given, message in (
        (QuestionAnswering(True, 9), {"datamodule": data}, r"up to 9 tokens or none, and the data's is .* up to 30"),
        (QuestionAnswering(True), {"dataloaders": data.val_dataloader()}, r"give data with a `task`"),
    ):
        module = SupervisedModule(network, partial(torch.optim.AdamW, lr=1e-3), task=task)
        with pytest.raises(ConfigError, match=message):
            L.Trainer(accelerator="cpu", **OFF).validate(module, **given, verbose=False)
