"""Losses, teachers and trainings on a GPU: the same as on a CPU, in 16 bits, compiled, on a stream of their own."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks.task import objective
from gpu.training import Data
from kd_lightning.config.instantiate import build
from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.fused_linear import fused_linear_kd
from kd_lightning.losses.generalized_jsd import generalized_jsd
from kd_lightning.losses.reverse_kl import reverse_kl
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.models.adapt import run_network
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.text_cnn import TextCNN
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks import Classification
from kd_lightning.teachers import AheadTeacher, CachedTeacher, FrozenTeacher, Teacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.callbacks import ResumeCheckpoint
from kd_lightning.training.callbacks.compilation import Compilation
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.types import Batch
from tests import ranks
from tests.config.test_catalog import NETWORKS, PAIRS, Gradients, examples_of, made
from tests.end_to_end.test_precision import CASES
from tests.gpu.conftest import ACCELERATOR, DEVICE
from tests.losses.conformance import Case, title

pytestmark = pytest.mark.gpu
ON_GPU = DEVICE.type == "cuda"
WIDE = {"vocab_size": 200, "num_classes": 3, "hidden_size": 64, "num_layers": 3, "intermediate_size": 128}


def on_device(batch: Batch) -> Batch:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def batches(count: int = 6, size: int = 8, length: int = 12, words: int = 200) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        lengths = torch.randint(3, length + 1, (size, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        found.append({
            "input_ids": torch.randint(1, words, (size, length), generator=generator) * mask,
            "attention_mask": mask,
            "labels": torch.randint(0, 3, (size,), generator=generator),
            "index": torch.arange(number * size, (number + 1) * size),
        })  # fmt: skip
    return found


def network(seed: int = 0, dropout: float = 0.0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    return transformer(**{**WIDE, **sizes}, dropout=dropout)


class Losses(L.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(outputs["loss"].detach())

    @property
    def values(self) -> Tensor:
        return torch.stack(self.seen).float().cpu()


def fit(
    module: L.LightningModule, data: L.LightningDataModule, ckpt_path: Path | None = None, **options: Any
) -> Tensor:
    """Train on the device; return the losses."""
    losses = Losses()
    callbacks = [losses, *options.pop("callbacks", [])]
    trainer = L.Trainer(**{
        "accelerator": ACCELERATOR, "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "use_distributed_sampler": False, "gradient_clip_val": 1.0, "callbacks": callbacks, **options,
    })  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return losses.values


def distilled(teacher: Teacher, student: nn.Module | None = None, lr: float = 1e-3, fused: bool = True) -> Any:
    adamw = partial(torch.optim.AdamW, lr=lr, fused=fused)
    return DistillationModule(
        student or network(1, hidden_size=32), teacher, objective(), adamw, task=Classification(3)
    )


# -- the same numbers as on a CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=title)
def test_every_loss_is_that_of_the_cpu(case: Case) -> None:
    def at(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        options = {name: moved(value) for name, value in case.options.items()}
        tensors = [moved(x) for x in case.tensors]
        student = tensors[0].clone().requires_grad_()
        value = dataclasses.replace(case, options=options)(student, *tensors[1:])
        assert value.device.type == device.type
        (gradient,) = torch.autograd.grad(value, student)
        return value.detach().cpu().double(), gradient.cpu().double()

    exact = at(torch.device("cpu"), torch.float64)
    for found, expected in zip(at(DEVICE, torch.float32), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["transformer", "bilstm", "text_cnn", "cnn", "resnet"])
def test_networks_predict_what_they_do_on_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "num_classes": 3, "pad_token_id": 0}
    if kind in ("cnn", "resnet"):
        teacher, student, _ = NETWORKS["vision"]
        model, batch = (teacher if kind == "resnet" else student)(), examples_of("vision")
    else:
        makes = {
            "transformer": lambda: network(),
            "bilstm": lambda: BiLSTM(**sizes),
            "text_cnn": lambda: TextCNN(**sizes),
        }
        model, batch = makes[kind](), batches(1)[0]
    model.eval()
    with torch.no_grad():
        expected = run_network(model, batch).logits
        found = run_network(model.to(DEVICE), on_device(batch)).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)  # cuDNN convolves in TF32


DENSE: dict[str, Callable[..., Tensor]] = {
    "forward_kl": soft_target,
    "reverse_kl": reverse_kl,
    "jsd": lambda s, t, temperature: generalized_jsd(s, t, temperature=temperature, beta=0.5),
}


@pytest.mark.parametrize("divergence", DENSE)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_the_fused_loss_is_the_dense_one(divergence: Literal["forward_kl", "reverse_kl", "jsd"], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, words = 96, 1000
    h_s, h_t = (torch.randn(tokens, width, generator=generator) for width in (32, 48))
    w_s, w_t = (torch.randn(words, width, generator=generator) * 0.3 for width in (32, 48))
    labels = torch.randint(words, (tokens,), generator=generator)
    labels[::5] = -100
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    tensors = [x.to(dtype) for x in (h_s, h_t, w_s, w_t)]

    exact = [x.double().requires_grad_() for x in tensors]
    z_s, z_t, counts = exact[0] @ exact[2].T, exact[1] @ exact[3].T, labels != -100
    dense = DENSE[divergence](z_s[counts], z_t[counts].detach(), temperature=2.0)
    expected = 0.5 * cross_entropy(z_s, labels) + 0.5 * dense
    expected.backward()

    own = [x.to(DEVICE).requires_grad_() for x in tensors]
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=kind == "autocast"):
        found = fused_linear_kd(*own, labels.to(DEVICE), temperature=2.0, divergence=divergence).loss
    found.backward()
    near = 1e-4 if kind == "float32" else 3e-2
    assert abs(found.item() - expected.item()) < near * abs(expected.item())
    for got, want in ((own[0].grad, exact[0].grad), (own[2].grad, exact[2].grad)):
        assert got is not None and want is not None  # noqa: PT018
        assert float((got.cpu().double() - want).norm() / want.norm()) < near


@pytest.mark.parametrize(("name", "kind"), PAIRS if ON_GPU else PAIRS[::8])  # all: tests/config/test_catalog.py
def test_every_strategy_trains(name: str, kind: str, composed: Callable[..., DictConfig]) -> None:
    """What is left on another device than the batch raises."""
    module, data = made(name, kind, composed)
    gradients = Gradients()
    number = PAIRS.index((name, kind))
    precision = ("32-true", "bf16-mixed", "16-mixed" if ON_GPU else "bf16-true")[number % 3]
    module.optimizer = partial(torch.optim.AdamW, lr=1e-3)
    fit(module, data, max_epochs=1, precision=precision, callbacks=[gradients])
    assert len(gradients.losses) == 2
    assert all(map(math.isfinite, gradients.losses))
    for parameter in module.parameters():
        assert parameter.isfinite().all()


# -- 16 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_sixteen_bits_train_as_thirty_two(precision: str, composed: Callable[..., DictConfig]) -> None:
    """With the optimizer of the configuration, fused where that can be, and clipped gradients."""
    if precision == "16-mixed" and not ON_GPU:
        pytest.skip("16-mixed is a GPU's")
    found = []
    for own in ("32-true", precision):
        module = distilled(FrozenTeacher(network()))
        module.optimizer = build(composed(f"trainer.precision={own}").optimizer)
        seen: list[torch.dtype] = []
        module.objective.register_forward_hook(lambda *given, seen=seen: seen.append(given[2][0].dtype))
        found.append(fit(module, Data(batches()), precision=own))
        assert set(seen) == {torch.float32}
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02)


def test_steps_that_overflow_are_left_out_and_counted() -> None:
    module, _ = ranks.overflowing(Path(), 1)
    start = copy.deepcopy(module.state_dict())
    one = {"pixel_values": torch.ones(16, 2), "labels": torch.full((16,), 100.0), "index": torch.arange(16)}
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16, growth_interval=1000)
    module.optimizer = partial(torch.optim.SGD, lr=1e-3)
    weights: list[dict[str, Tensor]] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            weights.append({name: x.detach().cpu().clone() for name, x in module.state_dict().items()})

    plugin = MixedPrecision("16-mixed", DEVICE.type, scaler=scaler)
    fit(module, Data([one] * 12), max_epochs=1, plugins=[plugin], callbacks=[Keep()], gradient_clip_val=None)
    assert 0 < module.skipped_steps < 12
    for name, value in weights[0].items():
        assert torch.equal(value, start[name]), "the first step overflows and changes nothing"
    assert any(not torch.equal(value, start[name]) for name, value in weights[-1].items())


@pytest.mark.parametrize("precision", ["float32", "bf16", "float16"])
def test_a_teachers_precision_is_its_own(precision: Literal["float32", "bf16", "float16"]) -> None:
    """Weights cast once give what autocast gives, bit by bit, also within the student's autocast."""
    if precision == "float16" and not ON_GPU:
        with pytest.raises(ConfigError, match="needs a GPU"):
            FrozenTeacher(network(), precision).to(DEVICE)
        return
    whole, batch = network().eval().to(DEVICE), on_device(batches(1)[0])
    teacher = FrozenTeacher(network(), precision).to(DEVICE)
    half = {"bf16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.bfloat16)
    with torch.no_grad():
        exact = run_network(whole, batch).logits
        with torch.autocast(DEVICE.type, half, enabled=precision != "float32"):
            expected = run_network(whole, batch).logits.float()
    found = teacher(batch).logits
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = teacher(batch).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(found, inside)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


# -- the teacher beside the student -----------------------------------------------------------------------------------


def test_a_teacher_ahead_predicts_for_its_own_batch() -> None:
    """The side stream against a student's stream that is busy and reuses memory all the time."""
    teacher = FrozenTeacher(network(hidden_size=128), "float32").to(DEVICE)
    given = batches(60, size=16, length=32)
    direct = [teacher(on_device(batch)).logits for batch in given]
    ahead = AheadTeacher(teacher).to(DEVICE)
    loader = ahead.around(given)
    assert (getattr(loader, "stream", None) is not None) == ON_GPU
    waste = torch.zeros(512, 512, device=DEVICE)
    for number, batch in enumerate(loader):
        for _ in range(20 if ON_GPU else 1):
            waste = torch.randn(512, 512, device=DEVICE) @ torch.randn(512, 512, device=DEVICE)
        assert torch.equal(ahead(on_device(batch)).logits, direct[number])
    assert torch.isfinite(waste).all()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_training_with_the_teacher_ahead_is_the_same_bit_by_bit(precision: str) -> None:
    found = []
    for ahead in (False, True):
        teacher: Any = FrozenTeacher(network(hidden_size=128))
        data = Data(batches(12, size=16, length=32))
        if ahead:
            teacher = AheadTeacher(teacher)
            data.around = teacher.around
        module = DistillationModule(
            network(1), teacher, objective(), partial(torch.optim.AdamW, lr=1e-3), task=Classification(3)
        )
        losses = fit(module, data, precision=precision)
        found.append((losses, {name: x.cpu() for name, x in module.student.state_dict().items()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, weight in found[0][1].items():
        assert torch.equal(weight, found[1][1][name]), name


def test_a_cache_filled_here_is_that_of_a_cpu(tmp_path: Path) -> None:
    given, found = batches(), []
    for device in (torch.device("cpu"), DEVICE):
        teacher = FrozenTeacher(network(), features=["hidden[-1]"]).to(device)
        cache = TeacherCache.create(tmp_path / f"on {device.type} {len(found)}", {}, 48)
        fill(cache, teacher, [{name: value.to(device) for name, value in batch.items()} for batch in given])
        found.append(CachedTeacher(cache).to(torch.device("cpu")))
    for batch in given:
        expected, got = (teacher(batch) for teacher in found)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.features["hidden[-1]"], expected.features["hidden[-1]"], rtol=1e-3, atol=1e-3)
    there = CachedTeacher(found[1].cache).to(DEVICE)(on_device(given[0])).logits
    assert there.device.type == DEVICE.type


def test_compiled_they_train_as_before() -> None:
    plain, compiled = (
        fit(
            distilled(FrozenTeacher(network(), compile=compile)), Data(batches(6)),
            callbacks=[Compilation()] if compile else [],
        )
        for compile in (False, True)
    )  # fmt: skip
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)


# -- a process group of one, and going on -----------------------------------------------------------------------------


@pytest.fixture
def no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_group_left", "deterministic")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_process_of_a_group_trains_as_one_alone(strategy: str, precision: str) -> None:
    def weights(how: Any) -> dict[str, Tensor]:
        module = distilled(FrozenTeacher(network()), fused=False)
        module.optimizer = ranks.SGD
        fit(module, Data(batches()), strategy=how, precision=precision)
        if how != "auto":
            assert dist.get_backend() == ("nccl" if ON_GPU else "gloo")
        found = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in module.student.state_dict().items()}
        return {name: x.detach().cpu() for name, x in found.items()}

    alone = weights("auto")
    together = weights("ddp" if strategy == "ddp" else _one_shard())
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        near = 1e-5 if precision == "32-true" else 5e-3  # FSDP2 adds its gradients up in another order
        torch.testing.assert_close(
            together[name], weight, rtol=near, atol=near, msg=lambda m, name=name: f"{name}: {m}"
        )


def _one_shard() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(1, 1, save_distributed_checkpoint=False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resumed_it_ends_with_the_same_bits(precision: str, tmp_path: Path) -> None:
    """Dropout, optimizer, GradScaler and the position in the epoch go on where they were."""
    if precision == "16-mixed" and not ON_GPU:
        pytest.skip("16-mixed is a GPU's")

    def training(steps: int, resume: Path | None, keep: Path | None) -> Any:
        module, data = ranks.distilled(tmp_path, 1, "soft_target")
        module.student.load_state_dict(start)
        for part in module.student.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.2
        callbacks = [] if keep is None else [ResumeCheckpoint(keep, 5)]
        fit(
            module, data, resume, max_steps=steps, max_epochs=-1, precision=precision, callbacks=callbacks,
            enable_checkpointing=keep is not None, default_root_dir=tmp_path,
        )  # fmt: skip
        return {name: x.cpu() for name, x in module.student.state_dict().items()}

    start = copy.deepcopy(ranks.distilled(tmp_path, 1, "soft_target")[0].student.state_dict())
    whole = training(40, None, None)
    training(12, None, tmp_path / "resume.ckpt")
    resumed = training(40, tmp_path / "resume.ckpt", None)
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
