"""Seconds to distil a sentence encoder into half of its layers: this library against sentence-transformers.

The same for all: all-MiniLM-L6-v2 as the teacher, its layers 2, 4 and 6 as the student, TEXTS long descriptions of
Debian packages, each cut to 128 tokens, shuffled batches of 64, AdamW at 1e-4, gradients clipped at 1, the squared
error of the embeddings, float32 on both sides, the process's threads, no evaluation and no logging. Loading the
networks is outside the time of all; inside is everything from texts in memory to the last step: tokenising, the
teacher's embeddings, for ours also their cache on disk. One epoch, and four: their difference is three epochs of which
nothing is the first. Each runs in a fresh process every round, the order rotated.

ours: `DistillationModule` under `lightning.Trainer`, the teacher's embeddings cached in float16 before the training, by
    texts of like length.
sentence-transformers: its own recipe (`examples/sentence_transformer/training/distillation/model_distillation.py` of
    version 5 and later): `teacher.encode` of all texts, the embeddings as labels, `MSELoss` under
    `SentenceTransformerTrainer`.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Measure, fresh_process, ratios
from benchmarks.peers_task import plain_trainer
from benchmarks.task import CLIP, silence
from kd_lightning.data.sources.debian_pairs import DebianPairs

TEXTS, BATCH, RATE, LENGTH, LAYERS = 4096, 64, 1e-4, 128, (1, 3, 5)
EPOCHS, ROUNDS = (1, 4), 5
CONTESTANTS = ("ours", "sentence_transformers")


def run(texts: int = TEXTS, rounds: int = ROUNDS) -> list[Measure]:
    """Race both."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in descriptions(texts)), encoding="utf-8")
        seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in CONTESTANTS for n in EPOCHS}
        turns = list(seconds)
        for turn in range(rounds):
            for name, epochs in turns[turn % len(turns) :] + turns[: turn % len(turns)]:
                done = fresh_process(f"benchmarks.embed_peers:{name}", file=str(file), epochs=epochs)
                seconds[name, epochs].append(done["seconds"])
    first, last = EPOCHS
    later = {
        name: [(b - a) / (last - first) for a, b in zip(seconds[name, first], seconds[name, last], strict=True)]
        for name in CONTESTANTS
    }
    ours, peer = CONTESTANTS
    return [
        Measure("sentence-transformers / ours, one epoch, cache included",
                ratios(seconds[peer, first], seconds[ours, first]), "ratio", ">= 2"),
        Measure("sentence-transformers / ours, a later epoch", ratios(later[peer], later[ours]), "ratio", ">= 4"),
        *(Measure(f"{name}, {n} epochs", values, "s") for (name, n), values in seconds.items()),
    ]  # fmt: skip


def descriptions(count: int) -> list[str]:
    """Return the long descriptions of so many packages, each on one line."""
    corpus = DebianPairs(tokenizer="minilm").read()
    texts = dict.fromkeys(" ".join(group.texts[1].split()) for group in corpus.train if len(group.texts) > 1)
    return list(texts)[:count]


# -- in the fresh processes -------------------------------------------------------------------------------------------


def ours(file: str, epochs: int) -> dict[str, float]:
    """Train from a cache that is filled before."""
    from kd_lightning.data import EmbeddingFiles
    from kd_lightning.losses.embedding_mse import EmbeddingMSELoss
    from kd_lightning.models.from_teacher import from_teacher
    from kd_lightning.models.sentence_encoder import sentence_encoder
    from kd_lightning.teachers import CachedTeacher, FrozenTeacher
    from kd_lightning.teachers.cache.fill import fill
    from kd_lightning.teachers.cache.outputs import Storage
    from kd_lightning.teachers.cache.store import TeacherCache
    from kd_lightning.training.distillation import DistillationModule
    from kd_lightning.training.objective import Objective

    silence()
    network = sentence_encoder("minilm").eval()
    student = from_teacher(network, network.num_classes, layers=list(LAYERS))
    trainer = plain_trainer(epochs)
    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder) / "held_out.jsonl"
        pairs = [{"text": f"number {n}", "positive": f"the number {n}"} for n in range(2)]
        held_out.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
        started = time.perf_counter()
        data = EmbeddingFiles(
            file, str(held_out), str(held_out), positive_column="positive", tokenizer="minilm", max_length=LENGTH,
            batch_size=BATCH, cache_dir=folder,
        )  # fmt: skip
        data.prepare()
        cache = TeacherCache.create(
            Path(folder) / "cache", {"teacher": "benchmark"}, data.num_examples, Storage("float16")
        )
        fill(cache, FrozenTeacher(network), data.with_batches(eval_batch_size=128).all_dataloader())
        module = DistillationModule(
            student, CachedTeacher(cache), Objective({"kd": EmbeddingMSELoss(projector="none")}, {"kd": 1.0}),
            lambda parameters: torch.optim.AdamW(parameters, lr=RATE), task=data.task,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        return {"seconds": time.perf_counter() - started}


def sentence_transformers(file: str, epochs: int) -> dict[str, float]:
    """Train by the recipe of sentence-transformers."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MSELoss

    from kd_lightning.runtime.assets import fetch

    silence()
    source = str(fetch("minilm"))
    teacher, student = SentenceTransformer(source, device="cpu"), SentenceTransformer(source, device="cpu")
    network: Any = student[0].auto_model
    network.encoder.layer = torch.nn.ModuleList(network.encoder.layer[i] for i in LAYERS)
    network.config.num_hidden_layers = len(LAYERS)
    for model in (teacher, student):
        model.max_seq_length = LENGTH
    texts = [json.loads(line)["text"] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=RATE,
            lr_scheduler_type="constant", max_grad_norm=CLIP, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True, optim="adamw_torch_fused", weight_decay=0.01,
        )  # fmt: skip
        started = time.perf_counter()
        labels = teacher.encode(texts, batch_size=128, show_progress_bar=False).tolist()
        rows = Dataset.from_dict({"sentence": texts, "label": labels})
        SentenceTransformerTrainer(model=student, args=arguments, train_dataset=rows, loss=MSELoss(student)).train()
        return {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps([measure.to_dict() for measure in run(256, 1)], indent=1))
