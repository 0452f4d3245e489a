"""Distillation step by step, on networks small enough to recompute in NumPy."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss, Term
from kd_lightning.tasks import Classification
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.distillation import DistillationModule, SupervisedModule
from kd_lightning.training.objective import Objective
from kd_lightning.training.optim import warmup_linear
from kd_lightning.training.schedules import Linear, OneMinus
from kd_lightning.types import IGNORE, Batch, ModelOutput
from tests.tasks.test_metrics import calibration_error

FEATURES, CLASSES = 6, 4


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.linear(pixel_values)
        return logits


class TeacherNetwork(nn.Module):
    """Has what a teacher that is not in eval mode would betray itself by; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES), nn.Dropout(0.5)
        self.calls = {True: 0, False: 0}  # by whether autograd was on: inference mode turns it off

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.calls[torch.is_grad_enabled()] += 1
        logits: Tensor = self.dropout(self.norm(3 * self.linear(pixel_values)))
        return logits


class Hint(Term):
    """A term with a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(CLASSES, CLASSES)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
        return (self.projector(student.logits) - teacher.logits).square().mean()


def reference(alpha: float = 0.7, temperature: float = 3.0) -> Objective:
    return Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(temperature)}, {"ce": 1 - alpha, "kd": alpha})


def labels_only() -> Objective:
    return Objective({"ce": CrossEntropyLoss()}, {"ce": 1.0})


def teacher_network() -> TeacherNetwork:
    torch.manual_seed(7)
    network = TeacherNetwork()
    network(2 * torch.randn(32, FEATURES) + 1)  # BatchNorm buffers of a trained network
    return network


def make(objective: Objective | None = None, teacher: Any = None, **options: Any) -> DistillationModule:
    torch.manual_seed(1)
    options = {"optimizer": partial(torch.optim.AdamW, lr=0.05), "task": Classification(CLASSES), **options}
    student = options.pop("student", None) or Student()
    return DistillationModule(student, teacher or FrozenTeacher(teacher_network()), objective or reference(), **options)


def batches(sizes: list[int], unlabelled: bool = False, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    found, start = [], 0
    for size in sizes:
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        if unlabelled:
            labels[::3] = IGNORE
        inputs = torch.randn(size, FEATURES, generator=generator)
        found.append({"pixel_values": inputs, "labels": labels, "index": torch.arange(start, start + size)})
        start += size
    return found


def loader(examples: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(examples, batch_size=None)  # type: ignore[arg-type]


def make_trainer(**options: Any) -> L.Trainer:
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options}
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


class Record(Callback):
    """Every training step's logged values, and the weights it began with."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before.append(copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.metrics.append({name: float(value) for name, value in metrics if name.startswith("train/")})


def float64(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()


def teachers_logits(network: TeacherNetwork, inputs: Tensor) -> np.ndarray:
    """Linear layer and BatchNorm in eval mode, without a dropout, in float64."""
    norm = network.norm
    hidden = 3 * (float64(inputs) @ float64(network.linear.weight).T + float64(network.linear.bias))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    hidden = (hidden - float64(norm.running_mean)) / np.sqrt(float64(norm.running_var) + norm.eps)
    return np.asarray(hidden * float64(norm.weight) + float64(norm.bias))


def by_numpy(z_s: np.ndarray, z_t: np.ndarray, labels: Tensor, temperature: float) -> tuple[float, float]:
    """CE over the labelled examples, and T^2 KL over all."""
    known = (labels != IGNORE).numpy()
    ce = -log_softmax(z_s[known], axis=-1)[np.arange(known.sum()), labels.numpy()[known]].mean()
    p, q = softmax(z_t / temperature, axis=-1), softmax(z_s / temperature, axis=-1)
    return float(ce), float(temperature**2 * entropy(p, q, axis=-1).mean())


# -- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "temperature"), [(0.7, 3.0), (0.1, 1.0), (0.5, 2.0), (0.9, 8.0)])
def test_every_steps_loss_is_the_formula_in_float64(alpha: float, temperature: float) -> None:
    network, record = teacher_network(), Record()
    module = make(reference(alpha, temperature), FrozenTeacher(network))
    data = batches([9, 5, 7, 9], unlabelled=True)
    make_trainer(callbacks=[record]).fit(module, loader(data))
    assert len(record.metrics) == 4
    for batch, before, logged in zip(data, record.before, record.metrics, strict=True):
        weight, bias = float64(before["student.linear.weight"]), float64(before["student.linear.bias"])
        z_s = float64(batch["pixel_values"]) @ weight.T + bias
        ce, kd = by_numpy(z_s, teachers_logits(network, batch["pixel_values"]), batch["labels"], temperature)
        rounding = max(1e-6, 1e-7 * temperature**2)  # T^2 also multiplies what float32 rounds off the KL
        assert logged["train/loss"] == pytest.approx((1 - alpha) * ce + alpha * kd, abs=rounding)
        assert logged["train/ce"] == pytest.approx(ce, abs=1e-6)
        assert logged["train/kd"] == pytest.approx(kd, abs=rounding)
        assert logged["train/kd/temperature"] == pytest.approx(temperature)
        assert logged["train/weight/kd"] == pytest.approx(alpha)
        assert logged["train/weight/ce"] == pytest.approx(1 - alpha)


def test_a_batch_that_only_the_teacher_labels() -> None:
    module, record = make(reference(0.7, 3.0)), Record()
    batch = batches([8])[0] | {"labels": torch.full((8,), IGNORE)}
    make_trainer(callbacks=[record]).fit(module, loader([batch]))
    assert record.metrics[0]["train/ce"] == 0.0
    assert record.metrics[0]["train/loss"] == pytest.approx(0.7 * record.metrics[0]["train/kd"])
    assert record.metrics[0]["train/kd"] > 0


def test_gradients_reach_every_student_parameter_and_no_teacher_parameter() -> None:
    class Gradients(Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, DistillationModule)
            seen.update({name: p.grad for name, p in pl_module.student.named_parameters()})

    seen: dict[str, Tensor | None] = {}
    network = teacher_network()
    before = copy.deepcopy(network.state_dict())
    module = make(teacher=FrozenTeacher(network))
    start = copy.deepcopy(module.student.state_dict())
    make_trainer(callbacks=[Gradients()]).fit(module, loader(batches([8, 8])), loader(batches([8])))
    assert set(seen) == {"linear.weight", "linear.bias"}
    for name, gradient in seen.items():
        assert gradient is not None
        assert gradient.abs().sum() > 0, name
        assert not torch.equal(module.student.state_dict()[name], start[name])
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, value in network.state_dict().items():  # weights and BatchNorm buffers
        assert torch.equal(value, before[name]), name
    assert network.calls == {True: 1, False: 3}  # with autograd only where this test built it


def test_the_teacher_stands_outside() -> None:
    network = teacher_network()
    module = make(teacher=FrozenTeacher(network))
    inside = {id(parameter) for parameter in module.parameters()}
    assert not inside & {id(parameter) for parameter in network.parameters()}
    assert not any("teacher" in name or "norm" in name for name in module.state_dict())
    assert not any(child is network for child in module.modules())
    module.train()
    assert not any(child.training for child in module.teacher.network.modules())  # type: ignore[attr-defined]
    assert module.student.training


def test_the_teacher_stays_in_eval_mode_through_a_whole_fit() -> None:
    class Modes(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            assert isinstance(pl_module, DistillationModule)
            modes.append((pl_module.student.training, any(child.training for child in network.modules())))

    modes: list[tuple[bool, bool]] = []
    network = teacher_network().train()
    trainer = make_trainer(callbacks=[Modes()], max_epochs=2)
    trainer.fit(make(teacher=FrozenTeacher(network)), loader(batches([8, 8])), loader(batches([8])))
    assert modes == [(True, False)] * 4


@pytest.mark.parametrize("objective", [labels_only, reference])
def test_the_teacher_is_asked_only_where_a_term_uses_it(objective: Any) -> None:
    class Asked(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(network.calls[False])

    counts: list[int] = []
    network = teacher_network()
    trainer = make_trainer(callbacks=[Asked()])
    trainer.fit(make(objective(), FrozenTeacher(network)), loader(batches([8, 8, 8])))
    assert counts == ([0, 0, 0] if objective is labels_only else [1, 2, 3])


def test_the_teacher_reads_its_own_entries() -> None:
    network, record = teacher_network(), Record()
    module = make(reference(1.0, 2.0), FrozenTeacher(network))
    batch = batches([8])[0]
    own = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(99))
    z_s = float64(module.student(batch["pixel_values"]))
    make_trainer(callbacks=[record]).fit(module, loader([{**batch, "teacher_pixel_values": own}]))
    _, kd = by_numpy(z_s, teachers_logits(network, own), batch["labels"], 2.0)
    assert record.metrics[0]["train/loss"] == pytest.approx(kd, rel=1e-6)


def test_a_cached_teacher_trains_to_the_same_student_bit_by_bit(tmp_path: Path) -> None:
    data, network = batches([8, 5, 8], unlabelled=True), teacher_network()
    kept = TeacherCache.create(tmp_path / "before", {}, 21)
    fill(kept, FrozenTeacher(network), data)
    filled = TeacherCache.create(tmp_path / "meanwhile", {}, 21)
    teachers = [FrozenTeacher(network), CachedTeacher(kept), CachedTeacher(filled, FrozenTeacher(network))]
    modules = [make(teacher=teacher) for teacher in teachers]
    for module in modules:
        make_trainer(max_epochs=2).fit(module, loader(data), loader(data))
    for module in modules[1:]:
        torch.testing.assert_close(module.student.state_dict(), modules[0].student.state_dict(), rtol=0, atol=0)
    assert filled.complete


# -- what is trained, and what is kept --------------------------------------------------------------------------------


def test_projectors_are_trained_and_checkpointed_and_the_teacher_is_not(tmp_path: Path) -> None:
    def build() -> DistillationModule:
        return make(
            Objective({"ce": CrossEntropyLoss(), "hint": Hint()}, {"ce": 1.0, "hint": 1.0}),
            scheduler=partial(warmup_linear, warmup=0.0),
        )

    module, trainer = build(), make_trainer()
    projector = module.objective.get_submodule("terms.hint.projector")
    start = copy.deepcopy(projector.state_dict())
    trainer.fit(module, loader(batches([8, 8])))
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    trainable = {"student.linear.weight", "student.linear.bias"}
    trainable |= {"objective.terms.hint.projector.weight", "objective.terms.hint.projector.bias"}
    assert optimized == {id(parameter) for parameter in module.parameters()}
    assert not torch.equal(projector.state_dict()["weight"], start["weight"])

    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == trainable
    kept = sum(len(state["state"]) for state in checkpoint["optimizer_states"])
    assert kept == len(trainable)

    again = build()
    make_trainer(max_epochs=1).fit(again, loader(batches([8, 8])), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    for name, value in again.state_dict().items():  # nothing was left to train
        assert torch.equal(value, module.state_dict()[name]), name


def test_biases_are_not_decayed() -> None:
    trainer = make_trainer()
    trainer.fit(make(optimizer=partial(torch.optim.AdamW, lr=0.05, weight_decay=0.3)), loader(batches([8])))
    groups = trainer.optimizers[0].param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.3, [2]), (0.0, [1])]


def test_a_module_can_be_sent_to_a_spawned_process() -> None:
    alpha = Linear(start=0.2, end=0.8)
    objective = Objective(
        {"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(Linear(4.0, 1.0))}, {"ce": OneMinus(alpha), "kd": alpha}
    )
    module = make(objective, scheduler=partial(warmup_linear, warmup=0.1))
    data = batches([8, 8])
    copied = pickle.loads(pickle.dumps(module))
    trainer = make_trainer()
    trainer.fit(copied, loader(data), loader(data))
    make_trainer().fit(module, loader(data), loader(data))
    torch.testing.assert_close(copied.state_dict(), module.state_dict())
    assert pickle.loads(pickle.dumps(module)).student is not None  # also after a fit


# -- what is logged ---------------------------------------------------------------------------------------------------


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    scores = []
    for c in range(CLASSES):
        hits = ((predicted == c) & (labels == c)).sum()
        if (counted := (predicted == c).sum() + (labels == c).sum()) > 0:
            scores.append(2 * hits / counted)
    return float(np.mean(scores))


def test_validation_scores_over_unequal_batches() -> None:
    network = teacher_network()
    module, data = make(teacher=FrozenTeacher(network)), batches([11, 2, 7, 1], seed=3)
    (scores,) = make_trainer().validate(module, loader(data), verbose=False)
    inputs = torch.cat([batch["pixel_values"] for batch in data])
    labels = torch.cat([batch["labels"] for batch in data])
    z_s, z_t = float64(module.student(inputs)), teachers_logits(network, inputs)
    ce, kl = by_numpy(z_s, z_t, labels, 1.0)
    assert scores == pytest.approx(
        {
            "val/loss": ce,
            "val/accuracy": (z_s.argmax(-1) == labels.numpy()).mean(),
            "val/macro_f1": macro_f1(z_s.argmax(-1), labels.numpy()),
            "val/ece": calibration_error(z_s, labels.numpy()),
            "val/cross_entropy": ce,
            "val/agreement": (z_s.argmax(-1) == z_t.argmax(-1)).mean(),
            "val/kl_to_teacher": kl,
        },
        rel=1e-5,
    )
    assert 0 < scores["val/accuracy"] < 1
    assert 0 < scores["val/agreement"] < 1


def test_unlabelled_validation_examples_count_only_against_the_teacher() -> None:
    network = teacher_network()
    module, data = make(teacher=FrozenTeacher(network)), batches([12, 3, 7], unlabelled=True, seed=3)
    data[1]["labels"][:] = IGNORE
    (scores,) = make_trainer().validate(module, loader(data), verbose=False)
    inputs = torch.cat([batch["pixel_values"] for batch in data])
    labels = torch.cat([batch["labels"] for batch in data])
    z_s, z_t = float64(module.student(inputs)), teachers_logits(network, inputs)
    ce, kl = by_numpy(z_s, z_t, labels, 1.0)
    known = (labels != IGNORE).numpy()
    assert scores["val/accuracy"] == pytest.approx((z_s.argmax(-1) == labels.numpy())[known].mean())
    assert scores["val/macro_f1"] == pytest.approx(macro_f1(z_s.argmax(-1)[known], labels.numpy()[known]))
    assert scores["val/agreement"] == pytest.approx((z_s.argmax(-1) == z_t.argmax(-1)).mean())
    assert scores["val/kl_to_teacher"] == pytest.approx(kl, rel=1e-5)
    assert scores["val/loss"] == pytest.approx(ce, rel=1e-5)


def test_each_look_at_validation_starts_afresh() -> None:
    class Looks(Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, DistillationModule)
            with torch.no_grad():
                predicted = pl_module.student(data[0]["pixel_values"]).argmax(-1)
            looks.append(
                (
                    float(trainer.callback_metrics["val/accuracy"]),
                    float((predicted == data[0]["labels"]).float().mean()),
                )
            )

    looks: list[tuple[float, float]] = []
    data = batches([40])
    make_trainer(max_epochs=4, callbacks=[Looks()]).fit(make(labels_only()), loader(data), loader(data))
    assert len({logged for logged, _ in looks}) > 1
    for logged, expected in looks:
        assert logged == pytest.approx(expected)


# -- schedules over a training ----------------------------------------------------------------------------------------


def scheduled() -> DistillationModule:
    alpha = Linear(start=0.0, end=1.0)
    objective = Objective(
        {"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(Linear(start=9.0, end=1.0))},
        {"ce": OneMinus(alpha), "kd": alpha},
    )
    return make(objective)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_temperature_and_alpha_move_over_the_training(accumulate: int) -> None:
    record = Record()
    trainer = make_trainer(max_epochs=3, callbacks=[record], accumulate_grad_batches=accumulate)
    data = batches([4] * 6)
    trainer.fit(scheduled(), loader(data))
    steps = 18 // accumulate
    progress = [(batch // accumulate) / (steps - 1) for batch in range(18)]  # 0 at the first step, 1 at the last
    z_t = teachers_logits(teacher_network(), torch.cat([batch["pixel_values"] for batch in data]))
    for i, (before, logged) in enumerate(zip(record.before, record.metrics, strict=True)):
        batch, p = data[i % 6], progress[i]
        z_s = float64(batch["pixel_values"]) @ float64(before["student.linear.weight"]).T
        z_s += float64(before["student.linear.bias"])
        ce, kd = by_numpy(z_s, z_t[batch["index"].numpy()], batch["labels"], 9 - 8 * p)
        assert logged["train/loss"] == pytest.approx((1 - p) * ce + p * kd, abs=1e-5)
    assert [logged["train/weight/kd"] for logged in record.metrics] == pytest.approx(progress)
    assert [logged["train/weight/ce"] for logged in record.metrics] == pytest.approx([1 - p for p in progress])
    assert [logged["train/kd/temperature"] for logged in record.metrics] == pytest.approx([9 - 8 * p for p in progress])


def test_schedules_go_on_where_they_were(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    data, whole, rest = batches([4] * 6), Record(), Record()
    uninterrupted, resumed = scheduled(), scheduled()
    make_trainer(max_epochs=3, callbacks=[whole, Save()]).fit(uninterrupted, loader(data))
    make_trainer(max_epochs=3, callbacks=[rest]).fit(
        resumed, loader(data), ckpt_path=tmp_path / "x.ckpt", weights_only=True
    )
    assert rest.metrics == whole.metrics[6:]
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, uninterrupted.state_dict()[name]), name


def test_bf16() -> None:
    record, data = Record(), batches([16, 16], unlabelled=True)
    module = make()
    trainer = make_trainer(precision="bf16-mixed", max_epochs=30, callbacks=[record])
    trainer.fit(module, loader(data), loader(data))
    losses = [logged["train/loss"] for logged in record.metrics]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    full = Record()
    make_trainer(callbacks=[full]).fit(make(), loader(data))
    assert losses[0] == pytest.approx(full.metrics[0]["train/loss"], rel=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_to_a_norm_over_student_and_projectors(precision: Any, fused: bool) -> None:
    def moved(clip: float | None) -> float:
        torch.manual_seed(2)
        objective = Objective({"hint": Hint()}, {"hint": 1.0})
        module = make(objective, optimizer=partial(torch.optim.SGD, lr=1.0, fused=fused))
        start = copy.deepcopy(module.state_dict())
        make_trainer(precision=precision, gradient_clip_val=clip).fit(module, loader(batches([8])))
        steps = [(value - start[name]).flatten() for name, value in module.state_dict().items()]
        return float(torch.cat(steps).norm())

    free = moved(None)
    assert free > 0.5
    assert moved(0.05) == pytest.approx(0.05, rel=1e-4)
    assert moved(2 * free) == pytest.approx(free)  # a norm below the limit is left alone


def test_several_micro_batches_make_one_step() -> None:
    data = batches([8, 8])
    whole = [{key: torch.cat([batch[key] for batch in data]) for key in data[0]}]
    modules = [make(optimizer=partial(torch.optim.SGD, lr=0.1)) for _ in range(2)]
    make_trainer(accumulate_grad_batches=2).fit(modules[0], loader(data))
    make_trainer().fit(modules[1], loader(whole))
    torch.testing.assert_close(modules[0].student.state_dict(), modules[1].student.state_dict())


# -- the same without a teacher ---------------------------------------------------------------------------------------


def test_learning_from_labels() -> None:
    torch.manual_seed(1)
    module, record = (
        SupervisedModule(Student(), partial(torch.optim.SGD, lr=0.1), task=Classification(CLASSES)),
        Record(),
    )
    data = batches([9, 5], unlabelled=True)
    make_trainer(callbacks=[record]).fit(module, loader(data))
    for batch, before, logged in zip(data, record.before, record.metrics, strict=True):
        z = float64(batch["pixel_values"]) @ float64(before["network.linear.weight"]).T
        z += float64(before["network.linear.bias"])
        assert logged["train/loss"] == pytest.approx(by_numpy(z, z, batch["labels"], 1.0)[0], abs=1e-6)


def test_distillation_with_alpha_zero_is_learning_from_labels() -> None:
    data = batches([9, 5, 9], unlabelled=True)
    distilled = make(reference(alpha=0.0))
    torch.manual_seed(1)
    baseline = SupervisedModule(Student(), partial(torch.optim.AdamW, lr=0.05), task=Classification(CLASSES))
    for module in (distilled, baseline):
        make_trainer(max_epochs=2).fit(module, loader(data))
    torch.testing.assert_close(distilled.student.state_dict(), baseline.network.state_dict())
