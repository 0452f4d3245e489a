"""Every file of conf/distillation, with the kinds of models it names: two steps of training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from kd_lightning.config.catalog import Strategy, strategies
from kd_lightning.config.instantiate import build, conf_dir
from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.term import Term
from kd_lightning.models.cnn import CNN, ResNet
from kd_lightning.models.cohort import joined
from kd_lightning.models.simkd import simkd
from kd_lightning.tasks import Classification
from kd_lightning.teachers import FrozenTeacher
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.objective import Objective
from kd_lightning.types import Batch

EXAMPLES, CLASSES, WORDS = 16, 3, 40
# Least of a term's gradient on the student, as a share of cross-entropy's. Tiny networks at their start say nearly the
# same of everything, so the smallest (MobileBERT's attentions) has 5e-4; what has no signal but rounding is below 1e-5.
FLOOR = 1e-4
STRATEGIES = {strategy.name: strategy for strategy in strategies(conf_dir() / "distillation")}
ALONE = ("language", "embedding", "ranking", "spans")
PAIRS = [(name, kind) for name, strategy in STRATEGIES.items() for kind in strategy.models if kind not in ALONE]
"""Those of language models alone are trained in tests/end_to_end/test_lm_experiments.py, of embeddings in
tests/config/test_embedding_strategies.py, of rankings in tests/config/test_ranking_strategies.py,
of spans in tests/config/test_span_strategies.py."""


class Data(L.LightningDataModule):
    """Examples in two batches, in the form that every data module of the package has."""

    num_examples = EXAMPLES

    def __init__(self, examples: Batch) -> None:
        super().__init__()
        half = EXAMPLES // 2
        self.batches = [{name: value[s] for name, value in examples.items()} for s in (slice(half), slice(half, None))]

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def bert(layers: int, width: int, heads: int = 4) -> nn.Module:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=CLASSES, **sizes))


def texts(generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(3, 8, (EXAMPLES, 1), generator=generator)
    mask = (torch.arange(7) < lengths).long()
    return {
        "input_ids": torch.randint(1, WORDS, (EXAMPLES, 7), generator=generator) * mask,
        "attention_mask": mask,
    }


def images(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(EXAMPLES, 1, 16, 16, generator=generator)}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "text": (lambda: bert(4, 16), lambda: bert(2, 8), texts),
    "vision": (lambda: ResNet(CLASSES, channels=1), lambda: CNN(CLASSES, channels=1), images),
}


def examples_of(kind: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)
    labels[3] = -100  # one that only the teacher labels
    return {**NETWORKS[kind][2](generator), "labels": labels, "index": torch.arange(EXAMPLES)}


class Gradients(L.Callback):
    """What every trained parameter's gradient summed to, over all steps."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                here = 0.0 if parameter.grad is None else float(parameter.grad.abs().sum())
                self.sums[name] = self.sums.get(name, 0.0) + here

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def gradient(value: Tensor, student: nn.Module) -> float:
    """The length of a value's gradient on the student."""
    parameters = [x for x in student.parameters() if x.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(x.square().sum()) for x in found if x is not None))


def shares(module: DistillationModule, batch: Batch) -> dict[str, float]:
    """The length of each term's gradient on the student, times its largest weight, over that of cross-entropy."""
    student = module.train()._tap(batch)
    teacher = module._expected(batch, student)
    labels = gradient(cross_entropy(student.logits, batch["labels"]), module.student)
    found = {}
    for name, term in module.objective.terms.items():
        assert isinstance(term, Term)
        weight = module.objective.weights[name]
        largest = max(weight(progress) for progress in (0.0, 0.5, 1.0)) if callable(weight) else weight
        term.progress = 0.0
        found[name] = largest * gradient(term(student, teacher, batch), module.student) / labels
    return found


def test_there_are_strategies_for_both_kinds() -> None:
    assert len(STRATEGIES) > 40
    assert {kind for strategy in STRATEGIES.values() for kind in strategy.models} == {"text", "vision", *ALONE}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=lambda strategy: str(strategy.name))
def test_every_file_says_what_it_is(strategy: Strategy) -> None:
    assert strategy.idea.endswith(".")
    assert strategy.paper
    assert set(strategy.models) <= {"text", "vision", *ALONE}
    assert strategy.models


COMPOSED: dict[tuple[str, ...], DictConfig] = {}


def objective_of(name: str, composed: Callable[..., DictConfig], *overrides: str) -> Objective:
    """Build what a file says. That each is a choice of the command line, tests/pipeline/test_validation.py says."""
    if overrides not in COMPOSED:
        COMPOSED[overrides] = composed("alpha=0.5", *overrides)
    cfg = COMPOSED[overrides]
    cfg.distillation = OmegaConf.load(conf_dir() / "distillation" / f"{name}.yaml")
    objective: Objective = build(cfg.distillation)
    return objective


def made(name: str, kind: str, composed: Callable[..., DictConfig], *overrides: str) -> tuple[DistillationModule, Data]:
    """Small networks, the objective of a file and data, ready to train."""
    torch.manual_seed(0)
    make_teacher, make_student, _ = NETWORKS[kind]
    teacher_network, student = make_teacher().eval(), make_student()
    if name == "simkd":  # whose student has its teacher's classifier
        student = simkd(teacher_network, CLASSES, lambda num_classes: make_student())
    if name == "deep_mutual":  # whose student has peers
        student = joined(student, [make_student()])
    data = Data(examples_of(kind))
    objective = objective_of(name, composed, *overrides)
    objective.plan(student, teacher_network)
    teacher = FrozenTeacher(teacher_network, features=objective.needs_teacher)
    module = DistillationModule(
        student, teacher, objective, partial(torch.optim.AdamW, lr=1e-3), task=Classification(CLASSES)
    )
    module.connect(data.batches[0], EXAMPLES)
    return module, data


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_two_steps(name: str, kind: str, composed: Callable[..., DictConfig]) -> None:
    module, data = made(name, kind, composed)
    student, teacher = module.student, module.teacher
    assert isinstance(teacher, FrozenTeacher)
    before = copy.deepcopy(teacher.network.state_dict())
    for term, share in shares(module, data.batches[0]).items():
        assert math.isfinite(share)
        assert share > FLOOR, f"{term}: {share:.1e} of the gradient of cross-entropy"
    start = copy.deepcopy(student.state_dict())
    gradients = Gradients()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[gradients],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)

    assert len(gradients.losses) == 2
    assert all(math.isfinite(loss) for loss in gradients.losses)
    assert all(math.isfinite(total) for total in gradients.sums.values())
    reached = [name for name, total in gradients.sums.items() if name.startswith("student.") and total > 0]
    assert reached, "no gradient reaches the student"
    idle = [name for name, total in gradients.sums.items() if name.startswith("objective.") and total == 0]
    assert not idle, "learnable parts of the loss get no gradient"
    assert any(not torch.equal(value, start[name]) for name, value in student.state_dict().items())
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), f"the teacher's {name} changed"
    assert not [name for name in module.state_dict() if name.startswith("_outside") or "teacher" in name]
