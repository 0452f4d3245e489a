"""Whether time and memory per example stay the same from a thousand examples to a million.

A CSV file of sentences of 6 to 14 words and two classes, read by `TextFiles`; a teacher (transformer, 1 layer x 32)
predicts every example once; a student (BiLSTM, 16 each way) learns from labels and these outputs for one epoch at batch
size 256. Each size runs in a process of its own, without anything cached. Timed apart: getting the data ready (reading,
tokenising), the teacher's pass, the epoch. Memory: the most the process ever held, less what it held after the imports.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from benchmarks.common import Measure, fresh_process
from kd_lightning.data import TextData, TextFiles
from kd_lightning.data.text.tokens import load_tokenizer
from kd_lightning.losses import CrossEntropyLoss, SoftTargetLoss
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.transformer import transformer
from kd_lightning.tasks import Classification
from kd_lightning.teachers import CachedTeacher, FrozenTeacher, Teacher
from kd_lightning.teachers.cache.fill import fill
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.distillation import DistillationModule
from kd_lightning.training.objective import Objective

SIZES = (1_000, 10_000, 100_000, 1_000_000)
WORDS, HELD_OUT, SAMPLE = 2_000, 200, 2_000
PHASES = ("prepare", "teacher", "train")


def run(sizes: tuple[int, ...] = SIZES) -> list[Measure]:
    """Run every size; hold the last against the one before."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), sizes)
        found = {size: fresh_process("benchmarks.scaling:one", folder=folder, size=size) for size in sizes}
    measures = []
    for size, result in found.items():
        for phase in PHASES:
            name = f"{phase}, {size:,} examples"
            measures.append(Measure(name, [1e6 * result[phase] / size], "µs/example", note="one run"))
        held = 1e6 * (result["peak_rss_mb"] - result["import_rss_mb"])
        measures.append(Measure(f"memory, {size:,} examples", [held / 1e6], "MB", note="beyond the imports"))
    return measures + growth(found)


def growth(found: dict[int, dict[str, Any]]) -> list[Measure]:
    """Return what a further example costs at the largest size, and how that compares with the size before."""
    small, middle, large = sorted(found)[-3:]
    seconds = {size: sum(found[size][phase] for phase in PHASES) / size for size in (middle, large)}

    def marginal(less: int, more: int) -> float:
        return 1e6 * (found[more]["peak_rss_mb"] - found[less]["peak_rss_mb"]) / (more - less)

    between = f"{middle:,} -> {large:,}"
    earlier, later = marginal(small, middle), marginal(middle, large)
    return [
        Measure(f"memory of one more example, {small:,} -> {middle:,}", [earlier], "bytes/example"),
        Measure(f"memory of one more example, {between}", [later], "bytes/example"),
        Measure(f"time per example, {between}", [seconds[large] / seconds[middle]], "ratio", "<= 1.2", "one run"),
        Measure(
            f"memory of one more example, against the step before, {between}", [later / earlier], "ratio", "<= 1.2"
        ),
    ]


def write_files(folder: Path, sizes: tuple[int, ...]) -> None:
    """Write a training file of each size, a file to evaluate on, and the tokenizer they share."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(WORDS)]
    for name, size in ({"held_out": HELD_OUT} | {str(size): size for size in sizes}).items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8") as file:
            file.write("text,label\n")
            for number in range(size):
                file.write(f"{' '.join(rng.choices(words, k=rng.randint(6, 14)))},{number % 2}\n")
    sample = [" ".join(rng.choices(words, k=10)) for _ in range(SAMPLE)]
    load_tokenizer(f"wordpiece:{2 * WORDS}", sample).save_pretrained(folder / "tokenizer")


def one(folder: str, size: int) -> dict[str, Any]:
    """Do the whole work for one size and return the seconds of each phase."""
    home = Path(folder)
    held_out = str(home / "held_out.csv")
    marks = [time.perf_counter()]
    data = TextFiles(
        str(home / f"{size}.csv"), held_out, held_out, tokenizer=str(home / "tokenizer"), batch_size=256,
        eval_batch_size=256, cache_dir=str(home / f"tokens-{size}"),
    )  # fmt: skip
    data.prepare()
    marks.append(time.perf_counter())
    torch.manual_seed(0)
    arguments = data.model_arguments("student")
    network = transformer(**arguments, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    teacher = cached(data, network, home / f"teacher-{size}")
    marks.append(time.perf_counter())
    student = BiLSTM(**arguments, embedding_size=16, hidden_size=16)
    train(data, student, teacher)
    marks.append(time.perf_counter())
    return dict(zip(PHASES, (end - start for start, end in itertools.pairwise(marks)), strict=True))


def cached(data: TextData, network: nn.Module, folder: Path) -> Teacher:
    """Have the teacher predict every example once, and return it with what was stored."""
    cache = TeacherCache.create(folder, {"data": data.teacher_key}, data.num_examples)
    fill(cache, FrozenTeacher(network), data.all_dataloader())
    return CachedTeacher(cache)


def train(data: TextData, student: nn.Module, teacher: Teacher) -> None:
    """Train for one epoch from labels and the teacher."""
    objective = Objective({"ce": CrossEntropyLoss(), "kd": SoftTargetLoss(2.0)}, {"ce": 0.1, "kd": 0.9})
    module = DistillationModule(
        student,
        teacher,
        objective,
        partial(torch.optim.AdamW, lr=1e-3, fused=True),
        task=Classification(data.num_classes),
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
