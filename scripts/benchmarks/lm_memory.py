"""The sparse loss from hidden states against dense logits of student and teacher: time and peak memory.

4,096 tokens, a student 576 wide, a vocabulary of 49,152, float32: `(1 - alpha) CE + alpha KL` and the gradients of
hidden states and output layer. Ours reads K = 32 log probabilities and the tail; dense makes the student's logits and
reads the teacher's. Every round runs each in a fresh process, their order rotated; memory is its peak RSS less its RSS
after imports.

The two losses differ, since one merges the tail. At K = V they are equal, which `tests/` has.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Measure, fresh_process, ratios
from benchmarks.lm_task import random_sparse
from benchmarks.task import ALPHA
from kd_lightning.losses.cross_entropy import cross_entropy
from kd_lightning.losses.soft_target import soft_target
from kd_lightning.losses.sparse import sparse_linear_kd

VOCABULARY, TOKENS, WIDTH, ROUNDS = 49_152, 4_096, 576, 5


def run(tokens: int = TOKENS, rounds: int = ROUNDS) -> list[Measure]:
    """Measure both."""
    found: dict[str, list[dict[str, Any]]] = {"sparse": [], "dense": []}
    for turn in range(rounds):
        for name in sorted(found, reverse=bool(turn % 2)):
            found[name].append(fresh_process(f"benchmarks.lm_memory:{name}", tokens=tokens))
    seconds = {name: [one["seconds"] for one in each] for name, each in found.items()}
    memory = {name: [one["peak_rss_mb"] - one["import_rss_mb"] for one in each] for name, each in found.items()}
    size = f"V = {VOCABULARY:,}, {tokens:,} tokens"
    return [
        Measure(f"sparse + chunked / dense, {size}: peak memory", ratios(*memory.values()), "ratio", "<= 0.1667"),
        Measure(f"sparse + chunked / dense, {size}: time", ratios(*seconds.values()), "ratio"),
        *(Measure(f"{name}, {size}: peak memory", values, "MB") for name, values in memory.items()),
        *(Measure(f"{name}, {size}: time", values, "s") for name, values in seconds.items()),
    ]


def sparse(tokens: int) -> dict[str, float]:
    """One step from K stored log probabilities."""
    hidden, head, labels = _student(tokens)
    teacher = random_sparse(tokens, vocabulary=VOCABULARY)
    started = time.perf_counter()
    sparse_linear_kd(hidden, head, teacher, labels, ce_weight=1 - ALPHA, kd_weight=ALPHA).loss.backward()  # type: ignore[no-untyped-call]
    return {"seconds": time.perf_counter() - started}


def dense(tokens: int) -> dict[str, float]:
    """One step from all logits of both."""
    hidden, head, labels = _student(tokens)
    teacher = torch.randn(tokens, VOCABULARY)
    started = time.perf_counter()
    logits = hidden @ head.T
    loss = (1 - ALPHA) * cross_entropy(logits, labels) + ALPHA * soft_target(logits, teacher)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"seconds": time.perf_counter() - started}


def _student(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH).mul_(0.05).requires_grad_()
    return hidden, head, torch.randint(VOCABULARY, (tokens,))
