"""What the timings share: shapes, data, clocks, and a training as the pipeline does it beside one by hand."""

from __future__ import annotations

import copy
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.task import objective, textbook_loss
from kd_lightning.models.transformer import transformer
from kd_lightning.tasks import Classification
from kd_lightning.teachers import AheadTeacher, CachedTeacher, Teacher
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.callbacks import ResumeCheckpoint, StageProgress
from kd_lightning.training.callbacks.compilation import Compilation
from kd_lightning.training.distillation import DistillationModule, NetworkModule, SupervisedModule
from kd_lightning.training.optim import parameter_groups, warmup_linear
from kd_lightning.types import Batch, ModelOutput

DEVICE = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
WARMING = os.environ.get("GPU_CHECK_WARMING") == "1"
"""Whether only code is to be compiled, for a later process: two steps of each training, nothing in turn."""
WORDS, CLASSES = 30_522, 2


@cache
def _built(layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_heads": max(width // 64, 1)}
    return transformer(CLASSES, WORDS, num_layers=layers, **sizes)


@dataclass(frozen=True)
class Shape:
    """A BERT-style encoder and what it reads."""

    layers: int
    width: int
    batch: int
    length: int

    @property
    def network(self) -> nn.Module:
        """Such a network, with the weights of seed 0."""
        return copy.deepcopy(_built(self.layers, self.width))

    def flop(self, passes: int) -> float:
        """FLOP of a batch: `passes` 1 is the forward pass, 3 a training step."""
        tokens = self.batch * self.length
        weights = self.layers * 12 * self.width**2
        return passes * tokens * (2 * weights + 4 * self.layers * self.length * self.width)


def base(batch: int, layers: int = 12) -> Shape:
    """BERT-base, or some of its layers; a toy on a CPU."""
    return Shape(layers, 768, batch, 128) if ON_GPU else Shape(2 if layers > 3 else 1, 64, 4, 16)


def batches(shape: Shape, count: int) -> list[Batch]:
    """Return batches of random tokens without padding, in the main memory, pinned as a loader would."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        batch = {
            "input_ids": torch.randint(1, WORDS, (shape.batch, shape.length), generator=generator),
            "attention_mask": torch.ones(shape.batch, shape.length, dtype=torch.int64),
            "labels": torch.randint(0, CLASSES, (shape.batch,), generator=generator),
            "index": torch.arange(number * shape.batch, (number + 1) * shape.batch),
        }
        found.append({name: value.pin_memory() for name, value in batch.items()} if ON_GPU else batch)
    return found


class Data(L.LightningDataModule):
    """Those batches, over and over; a teacher that runs ahead is put around them."""

    around: Callable[[Any], Any] | None = None

    def __init__(self, given: list[Batch]) -> None:
        super().__init__()
        self.batches, self.num_examples = given, sum(len(batch["index"]) for batch in given)

    def train_dataloader(self) -> Any:
        """Return the loader, ahead of which a teacher runs."""
        return self.val_dataloader() if self.around is None else self.around(self.val_dataloader())

    def val_dataloader(self) -> Any:
        """Return the same batches for validation."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def synchronise() -> None:
    """Wait for the device."""
    if ON_GPU:
        torch.cuda.synchronize()


class Clock(L.Callback):
    """Times the training steps between two of them on the device's own clock."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seconds = first, last, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Read the time."""
        if trainer.global_step in (self.first, self.last):
            synchronise()
            self.seconds = time.perf_counter() - self.seconds


def train(module: NetworkModule, given: list[Batch], warm: int, steps: int, *, compile: bool = False) -> float:
    """Train as the pipeline does on a GPU, logging on; return the seconds of a step after the first `warm`."""
    warm, steps = (1, 2) if WARMING else (warm, steps)
    data, teacher = Data(given), getattr(module, "teacher", None)
    if isinstance(teacher, AheadTeacher):
        data.around = teacher.around
    clock, quiet = Clock(warm, steps), Console(file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        loggers = [CSVLogger(folder, "csv", flush_logs_every_n_steps=20), TensorBoardLogger(folder, "tensorboard")]
        callbacks: list[L.Callback] = [StageProgress("", quiet), ResumeCheckpoint(Path(folder) / "resume.ckpt", 10**6)]
        callbacks += [LearningRateMonitor("step"), *([Compilation()] if compile and ON_GPU else []), clock]
        trainer = L.Trainer(
            accelerator="gpu" if ON_GPU else "cpu", devices=1, precision="bf16-mixed", max_steps=steps, max_epochs=-1,
            gradient_clip_val=1.0, log_every_n_steps=10, logger=loggers, limit_val_batches=0,
            num_sanity_val_steps=0, default_root_dir=folder, use_distributed_sampler=False, enable_checkpointing=True,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return clock.seconds / (steps - warm)


def train_by_hand(network: nn.Module, table: Tensor, given: list[Batch], warm: int, steps: int) -> float:
    """Train in a minimal hand-written loop of the same math on the same batches; return the seconds of a step."""
    network = network.to(DEVICE).train()
    adamw = optimizer()(parameter_groups(network))
    schedule, table = warmup_linear(adamw, steps), table.to(DEVICE)
    started = 0.0
    for step in range(steps):
        if step == warm:
            synchronise()
            started = time.perf_counter()
        batch = {name: value.to(DEVICE, non_blocking=True) for name, value in given[step % len(given)].items()}
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = textbook_loss(logits.float(), table[batch["index"]], batch["labels"])
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        schedule.step()
    synchronise()
    return (time.perf_counter() - started) / (steps - warm)


def optimizer() -> Any:
    """Return the optimizer's constructor, as in conf/."""
    return partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.01, fused=True)


def supervised(network: nn.Module) -> SupervisedModule:
    """Return a training from labels as the pipeline makes it."""
    return SupervisedModule(network, optimizer(), warmup_linear, task=Classification(CLASSES))


def distilled(student: nn.Module, teacher: Teacher) -> DistillationModule:
    """Return a distillation as the pipeline makes it."""
    return DistillationModule(student, teacher, objective(), optimizer(), warmup_linear, task=Classification(CLASSES))


def stored(given: list[Batch], folder: Path) -> CachedTeacher:
    """Return a teacher whose predictions, random ones, are all in a cache."""
    examples = sum(len(batch["index"]) for batch in given)
    cache = TeacherCache.create(folder, {"teacher": "timings"}, examples)
    generator = torch.Generator().manual_seed(1)
    for batch in given:
        logits = torch.randn(len(batch["index"]), CLASSES, generator=generator)
        cache.add(batch["index"], ModelOutput(logits), batch["attention_mask"])
    cache.flush()
    return CachedTeacher(cache)


def in_turn(work: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time several pieces of work in turn, each round beginning with another one."""
    found: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in range(rounds if ON_GPU and not WARMING else 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(work[name]())
    return found


def timed(work: Callable[[], object], warm: int = 3, repeats: int = 10) -> list[float]:
    """Return seconds of each repeat on the device."""
    found = []
    for repeat in range(warm + repeats):
        synchronise()
        if ON_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1000
        else:
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
        if repeat >= warm:
            found.append(seconds)
    return found


def contest(contestant: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[list[float], float, float]:
    """Return seconds of each step, bytes of memory above the inputs' (with their gradients), and the loss."""

    def step() -> Tensor:
        for x in inputs:
            x.grad = None
        loss = contestant(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    step()  # compiles
    for x in inputs:
        x.grad = None
    if not ON_GPU:
        return timed(step, 1, 2), 0.0, float(step())
    synchronise()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = float(step())
    peak = torch.cuda.max_memory_allocated() - held
    return timed(step, 1, 5), float(peak), loss
