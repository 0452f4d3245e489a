"""Seconds to distil a language model of SmolLM2's size into a small one: this library against its peers.

The same for all: a teacher of 30 layers x 576 and a student of 6 layers x 288 with random weights (what they cost is
measured), BLOCKS blocks of 128 tokens of State of the Union addresses as one text, 3 epochs of shuffled batches of 8,
AdamW at 1e-3, gradients clipped at 1, SDPA attention, the process's threads, the student in float32, no evaluation and
no logging. Tokenisation, imports and building the networks are outside the time of all; inside is everything from there
to the last step: for ours also what prepares the teacher, and the building of its cache on disk. Each runs in a fresh
process every round, the order rotated.

ours: `DistillationModule` under `lightning.Trainer`, the teacher's 32 likeliest tokens and their tail cached while the
    first epoch trains, cross-entropy beside it; the teacher in its default precision (bfloat16 where the hardware
    multiplies it natively). Once with the vocabulary trimmed to what 150,000 tokens of the addresses use, as
    `experiment=lm_sotu` has it, which peers cannot do; once with all 49,152 tokens; once so with the teacher in
    float32.
TRL: `GKDTrainer` of trl 1.16 (`trl.experimental.gkd`) with `lmbda=0` (the texts are given) and `beta=0` (forward KL),
    the teacher in float32. It has no cross-entropy. The data are tokenised beforehand, and a collator stacks them.
transformers.Trainer: an overridden `compute_loss` with the textbook loss, as in its documentation
    (`docs/source/en/tasks/knowledge_distillation_for_image_classification.md`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.common import Measure, fresh_process, ratios
from benchmarks.lm_task import (
    BLOCK,
    FULL,
    STUDENT,
    TOP_K,
    addresses,
    network,
    smollm2_shaped,
    sparse_objective,
)
from benchmarks.peers import install
from benchmarks.peers_task import plain_trainer
from benchmarks.task import ALPHA, CLIP, optimizer, silence
from kd_lightning.config.resolvers import fast_inference
from kd_lightning.data import Sotu
from kd_lightning.teachers import CachedTeacher, FrozenTeacher
from kd_lightning.teachers.cache.outputs import Storage
from kd_lightning.teachers.cache.store import TeacherCache
from kd_lightning.training.distillation import DistillationModule

BLOCKS, BATCH, EPOCHS, ROUNDS = 32, 8, 3, 5
REQUIREMENTS = Path(__file__).with_name("lm_peers_requirements.txt")
OURS: dict[str, dict[str, Any]] = {
    "ours": {"trimmed": True, "float32": False},
    "ours, whole vocabulary": {"trimmed": False, "float32": False},
    "ours, whole vocabulary, float32": {"trimmed": False, "float32": True},
}
PEERS = {"TRL": "trl_gkd", "transformers.Trainer": "trainer"}


def run(blocks: int = BLOCKS, rounds: int = ROUNDS) -> list[Measure]:
    """Race all of them."""
    contestants: dict[str, tuple[str, dict[str, Any]]] = {name: ("ours", options) for name, options in OURS.items()}
    try:
        sys.path.append(str(install(REQUIREMENTS)))  # which every process started from here takes over
        contestants |= {name: (function, {}) for name, function in PEERS.items()}
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"lm_peers: none of them, since pip could not install: {str(error.stderr or error).strip()[-500:]}")
    addresses()  # fetched and tokenised before any process is timed
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            function, options = contestants[name]
            done = fresh_process(f"benchmarks.lm_peers:{function}", blocks=blocks, **options)
            seconds[name].append(done["seconds"])
    measures = [
        Measure(
            f"{peer} / {own}", ratios(seconds[peer], seconds[own]), "ratio", ">= 4" if "float32" not in own else None
        )
        for own in OURS
        for peer in PEERS
        if peer in seconds
    ]
    return measures + [Measure(name, values, "s") for name, values in seconds.items()]


# -- in the fresh processes -------------------------------------------------------------------------------------------


def few_addresses(blocks: int, tokenizer: str) -> Sotu:
    """Return so many training blocks, read as one text."""
    data = Sotu(
        tokenizer=tokenizer, train_tokens=blocks * BLOCK, block_size=BLOCK, batch_size=BATCH, packing="concat",
        end_of_text=False,
    )  # fmt: skip
    data.prepare()
    return data.select(tokens="student", pool=False)


def ours(blocks: int, trimmed: bool, float32: bool) -> dict[str, float]:
    """Train from a cache that the first epoch fills."""
    silence()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = FULL
        if trimmed:
            tokenizer = f"{folder}/tokenizer"
            addresses().tokenizer_of("student").save_pretrained(tokenizer)
        data = few_addresses(blocks, tokenizer)
        student, above = network(STUDENT, data), smollm2_shaped(len(data.tokenizer_of("student")))
        trainer = plain_trainer(EPOCHS)
        started = time.perf_counter()
        teacher = FrozenTeacher(above, "float32" if float32 else fast_inference())
        cache = TeacherCache.create(
            Path(folder) / "cache", {"teacher": "benchmark"}, data.sizes["train"], Storage("float16", TOP_K)
        )
        module = DistillationModule(
            student, CachedTeacher(cache, teacher), sparse_objective(), optimizer(), task=data.task
        )
        trainer.fit(module, datamodule=data)
        return {"seconds": time.perf_counter() - started}


def trl_gkd(blocks: int) -> dict[str, float]:
    """Train with TRL's trainer of given texts."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def build(student: Any, teacher: Any, rows: Dataset, tokenizer: Any, options: dict[str, Any]) -> Any:
        arguments = GKDConfig(
            lmbda=0.0, beta=0.0, temperature=1.0, max_length=BLOCK, bf16=False, gradient_checkpointing=False, **options
        )
        return GKDTrainer(
            student, teacher, arguments, data_collator=stacked, train_dataset=rows, processing_class=tokenizer
        )

    return _race(blocks, build)


def trainer(blocks: int) -> dict[str, float]:
    """Train with `transformers.Trainer` and the textbook loss."""
    from transformers import Trainer, TrainingArguments

    class Distilling(Trainer):
        def __init__(self, teacher: Any, **options: Any) -> None:
            super().__init__(**options)
            self.teacher = teacher.eval()

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            output = model(**inputs)
            with torch.no_grad():
                above = self.teacher(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
            below = output.logits[:, :-1].flatten(0, 1)
            soft = torch.nn.functional.kl_div(
                below.log_softmax(-1), above.log_softmax(-1), reduction="batchmean", log_target=True
            )
            loss = (1 - ALPHA) * output.loss + ALPHA * soft
            return (loss, output) if return_outputs else loss

    def build(student: Any, teacher: Any, rows: Dataset, tokenizer: Any, options: dict[str, Any]) -> Any:
        arguments = TrainingArguments(**options)
        return Distilling(teacher, model=student, args=arguments, data_collator=stacked, train_dataset=rows)

    return _race(blocks, build)


def stacked(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch of blocks of one length."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _race(blocks: int, build: Callable[..., Any]) -> dict[str, float]:
    silence()
    data = few_addresses(blocks, FULL)
    student = network(STUDENT, data, logits_in_training=True).network.train()
    teacher = smollm2_shaped(len(data.tokenizer_of("student"))).network
    ids = [row for batch in data.train_dataloader() for row in batch["input_ids"].tolist() if len(row) == BLOCK]
    rows = Dataset.from_dict({"input_ids": ids})
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": CLIP, "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused", "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False,
        }  # fmt: skip
        started = time.perf_counter()
        build(student, teacher, rows, data.tokenizer_of("student"), options).train()
        return {"seconds": time.perf_counter() - started}
