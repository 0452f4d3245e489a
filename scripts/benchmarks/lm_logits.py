"""A step of a small language model whose student gives all its logits: from the sparse cache against text alone.

The student is `experiment=lm_sotu`'s (6 layers x 288) with `student.logits_in_training=true`, on random tokens; in
`lm_step` its output layer is left to the loss. A step is all that a training does with a batch of 8 x 128 tokens but
reading it: forward, loss, backward, clipping and AdamW. Times are the process's own CPU seconds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common import Measure, ratios
from benchmarks.lm_task import BLOCK, STUDENT, random_sparse, sparse_objective
from benchmarks.task import CLIP, take_turns
from kd_lightning.losses import CrossEntropyLoss
from kd_lightning.models.causal_lm import causal_lm_small
from kd_lightning.training.objective import Objective
from kd_lightning.types import Batch, ModelOutput

BATCH, STEPS, ROUNDS = 8, 2, 7
VOCABULARIES = (49_152, 13_481, 5_000)


def run() -> list[Measure]:
    """Return one figure for each vocabulary."""
    return [_measured(words) for words in VOCABULARIES]


def _measured(words: int) -> Measure:
    torch.manual_seed(0)
    student = causal_lm_small(words, BLOCK, **STUDENT).train()
    ids = torch.randint(words, (BATCH, BLOCK))
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, -1] = keep[:, 50] = False  # where a block and a document end
    batch: Batch = {"input_ids": ids, "labels": ids.roll(-1, 1).masked_fill(~keep, -100), "keep": keep}
    teacher = ModelOutput(torch.zeros(BATCH, BLOCK, 0), sparse=random_sparse(BATCH, BLOCK, vocabulary=words))
    objectives = {"cached": sparse_objective(), "alone": Objective({"ce": CrossEntropyLoss()}, {"ce": 1.0})}
    work = {name: _steps(student, one, batch, teacher) for name, one in objectives.items()}
    seconds = take_turns(work, ROUNDS)
    name = f"all logits of {words:,} tokens: a step from the sparse cache / from text alone"
    return Measure(name, ratios(*seconds.values()), "ratio", "<= 1.03")


def _steps(student: nn.Module, objective: Objective, batch: Batch, teacher: ModelOutput) -> Callable[[], float]:
    """Return what trains for a few steps and returns their CPU seconds."""
    adamw = torch.optim.AdamW(student.parameters(), lr=1e-6)

    def steps() -> float:
        started = time.process_time()
        for _ in itertools.repeat(None, STEPS):
            output = ModelOutput(student(input_ids=batch["input_ids"]).logits)
            loss, _ = objective(output, teacher, batch)
            adamw.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            adamw.step()
        return time.process_time() - started

    return steps
