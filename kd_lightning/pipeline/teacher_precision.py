"""Holds a teacher's reduced precision against float32 before anything learns from it.

What 8 bits leave of a network does not follow from its kind: dynamic quantisation keeps a BERT, and it keeps half of a
causal language model's likeliest tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kd_lightning.data.batches import spread
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.tasks.evaluation import of_network
from kd_lightning.types import Batch

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.teachers import FrozenTeacher

MOST_KL = 0.1
"""Nats a row: the divergence from float32 up to which a precision is accepted."""
LEAST_SAME = 0.8
"""The share of rows with the same likeliest class from which it is."""
MOST_ERROR = 0.1
"""Of predicted scores: the root of the mean squared difference, in standard deviations of the labels."""
LEAST_COSINE = 0.99
"""Of embeddings: their mean cosine."""
LEAST_RANK = 0.95
"""Of rankings: Spearman's correlation of the scores of a query's documents, on average."""
BATCHES, ROWS, EXAMPLES, TOKENS = 4, 500, 16, 512
"""Batches at most, of so many examples or tokens at most; no more of them after so many rows."""
WINDOWS = 8
"""Examples of a batch where a whole window of tokens is compared as one row, as starts and ends of spans are."""


def check_precision(network: nn.Module, teacher: FrozenTeacher, data: IndexedData, device: torch.device) -> str:
    """Compare a teacher in its precision with the same network in float32; return the figures in words.

    No random number is drawn, and both are afterwards where they were.

    Args:
        network: In float32.
        teacher: The same, in another precision.
        data: With what it reads under the plain names; a few examples of the validation split count.
        device: Where they compute.

    Raises:
        ConfigError: They differ by more than the bounds above.
    """
    task, count, labels = data.task, 0, []
    here = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    scores, exact = task.fidelity().alone().to(device), of_network(network, device)
    teacher.to(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for given in _batches(data):
            batch = {name: value.to(device) for name, value in given.items()}
            rows, expected = task.compared(batch), exact(batch).logits.float()
            kept = rows.get("keep", torch.ones(len(expected), dtype=torch.bool, device=device))
            if count >= ROWS or not kept.any() or not expected[kept].isfinite().all():
                continue  # a teacher that is broken in float32 is refused for that
            scores.update(teacher(batch).logits, expected, rows)
            labels.append(rows["labels"][kept].float())
            count += len(expected) if task.in_context else int(kept.sum())
    teacher.to(here)
    network.to(here)
    found = {name: float(value) for name, value in scores.compute().items()} if count else {}
    return _judged(teacher.precision, found, count, labels)


def _judged(precision: str, found: dict[str, float], count: int, labels: list[Tensor]) -> str:
    """Return the figures in words.

    Raises:
        ConfigError: One is beyond its bound, or NaN.
    """
    words, fits = [], True
    if "kl_to_teacher" in found:
        divergence, same = found["kl_to_teacher"], found["agreement"]
        words = [f"KL {divergence:.2g} nats a row (at most {MOST_KL:g})"]
        words.append(f"top-1 equal {same:.3f} (at least {LEAST_SAME:g})")
        fits = divergence <= MOST_KL and same >= LEAST_SAME
    if "rmse_to_teacher" in found and (spread := float(torch.cat(labels).std())) > 0:
        error = found["rmse_to_teacher"] / spread
        words.append(f"scores differ by {error:.2g} standard deviations (at most {MOST_ERROR:g})")
        fits = error <= MOST_ERROR
    if "cosine_to_teacher" in found:
        cosine = found["cosine_to_teacher"]
        words, fits = [f"mean cosine {cosine:.5f} (at least {LEAST_COSINE:g})"], cosine >= LEAST_COSINE
    if "top_to_teacher" in found:
        rank = found["spearman_to_teacher"]
        words, fits = [f"rank correlation {rank:.4f} by query (at least {LEAST_RANK:g})"], rank >= LEAST_RANK
    line = f"{precision} against float32: {', '.join(words) or 'not compared'}, over {count:,} rows"
    if not fits:
        other = "float32" if precision == "bf16" else "bf16, or float32"
        raise ConfigError(f"teacher.precision={line}: set teacher.precision={other}")
    return line


def _batches(data: IndexedData) -> list[Batch]:
    """Return a few batches of short, middling and long validation examples."""
    longest = max(int(data.lengths.max()), 1)
    size = WINDOWS if data.task.in_context else max(min(EXAMPLES, TOKENS // longest), 1)
    return list(spread(data.with_batches(eval_batch_size=size).val_dataloader(), BATCHES))
