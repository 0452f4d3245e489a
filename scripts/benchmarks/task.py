"""The task that the benchmarks of the training step share: MiniLM-L6 teaches small students on `reviews`."""

from __future__ import annotations

import io
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn

from kd_lightning.data import Reviews
from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.hf import pretrained
from kd_lightning.models.transformer import transformer
from kd_lightning.runtime.log_filters import quiet
from kd_lightning.teachers import CachedTeacher, Teacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.callbacks import ResumeCheckpoint, StageProgress
from kd_lightning.training.objective import Objective
from kd_lightning.training.optim import parameter_groups, warmup_linear
from kd_lightning.types import Batch

TEMPERATURE, ALPHA, LEARNING_RATE, CLIP = 2.0, 0.9, 1e-3, 1.0


@cache
def reviews(batch_size: int = 32) -> Reviews:
    """Return the data, labelled sentences only."""
    data = Reviews(batch_size=batch_size)
    data.prepare()
    return data.select(tokens="student", pool=False)


def student(name: str) -> nn.Module:
    """Return a student with the weights of seed 0."""
    torch.manual_seed(0)
    sizes = reviews().model_arguments("student")
    if name == "BiLSTM-128":
        return BiLSTM(**sizes, embedding_size=128, hidden_size=128)
    return transformer(**sizes, hidden_size=128, num_layers=2, num_heads=2)


STUDENTS = ("transformer 2x128", "BiLSTM-128")


@cache
def teacher_network() -> nn.Module:
    """Return MiniLM-L6 with a new head of two classes: what it says is of no matter here, what it costs is."""
    torch.manual_seed(0)
    return pretrained("minilm", 2).eval()


def objective() -> Objective:
    """Return `(1 - alpha) CE + alpha T^2 KL`."""
    return Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(TEMPERATURE)}, {"ce": 1 - ALPHA, "kd": ALPHA})


def textbook_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the same loss as a hand-written loop has it."""
    soft = nn.functional.kl_div(
        (student_logits / TEMPERATURE).log_softmax(-1), (teacher_logits / TEMPERATURE).log_softmax(-1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return (1 - ALPHA) * nn.functional.cross_entropy(student_logits, labels) + ALPHA * TEMPERATURE**2 * soft


def optimizer() -> Any:
    """Return the optimizer's constructor, as in conf/."""
    return partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.01, fused=True)


scheduler = warmup_linear


class Clock(L.Callback):
    """Times the training steps between two of them, validation and set-up left out.

    Args:
        first: The step the clock starts after; the ones before warm up.
        last: The step it stops after.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seconds, self._started = first, last, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Read the time."""
        if trainer.global_step == self.first:
            self._started = time.perf_counter()
        if trainer.global_step == self.last:
            self.seconds = time.perf_counter() - self._started


def train_ours(
    module: L.LightningModule, warm: int, steps: int, *, logging: bool, data: L.LightningDataModule | None = None
) -> float:
    """Train as the pipeline does and return the seconds of the steps after the first `warm`.

    Args:
        module: Ours.
        warm: Steps not timed.
        steps: Steps in all.
        logging: With the pipeline's loggers and callbacks.
        data: What it is trained on; by default `reviews`.
    """
    clock = Clock(warm, steps)
    with tempfile.TemporaryDirectory() as folder:
        loggers = [CSVLogger(folder, "csv", flush_logs_every_n_steps=20), TensorBoardLogger(folder, "tensorboard")]
        quiet = Console(file=io.StringIO())
        callbacks = [StageProgress("", quiet), ResumeCheckpoint(Path(folder) / "resume.ckpt", 200)]
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, gradient_clip_val=CLIP, log_every_n_steps=10,
            logger=loggers if logging else False, limit_val_batches=0, num_sanity_val_steps=0, default_root_dir=folder,
            callbacks=[*callbacks, LearningRateMonitor("step"), clock] if logging else [clock],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=logging,
        )  # fmt: skip
        trainer.fit(module, data or reviews().select(tokens="student", pool=False))
    return clock.seconds


def train_by_hand(network: nn.Module, ask: Callable[[Batch], Tensor], warm: int, steps: int) -> float:
    """Train in a minimal hand-written loop, on the same batches, and return the seconds of the steps after `warm`."""
    network.train()
    adamw = optimizer()(parameter_groups(network))
    schedule = scheduler(adamw, steps)
    started = 0.0
    for done, batch in enumerate(itertools.islice(_endless(), steps)):
        if done == warm:
            started = time.perf_counter()
        output = network(batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = textbook_loss(output.logits, ask(batch), batch["labels"])
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        adamw.step()
        schedule.step()
    return time.perf_counter() - started


def _endless() -> Iterator[Batch]:
    loader = reviews().select(tokens="student", pool=False).train_dataloader()
    while True:
        yield from loader


def take_turns(work: dict[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """Like `interleave`, for work that times itself."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for name in names:
        work[name]()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(work[name]())
    return seconds


def silence() -> None:
    """Keep Lightning's remarks out of a benchmark's output."""
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def cache_of(teacher: Teacher, folder: Path) -> CachedTeacher:
    """Have a teacher predict everything and return its outputs."""
    data = reviews()
    cache = TeacherCache.create(folder / "cache", {"teacher": "benchmark"}, data.num_examples)
    fill(cache, teacher, data.select(tokens="teacher").all_dataloader())
    return CachedTeacher(cache)


def save_teacher(folder: Path) -> None:
    """Save MiniLM with its head as a finished classifier, and its tokenizer, in Hugging Face's layout."""
    network: Any = teacher_network()
    network.save_pretrained(folder)
    reviews().teacher_tokenizer.save_pretrained(folder)
