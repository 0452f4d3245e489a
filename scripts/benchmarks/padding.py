"""What padding costs: the same sentences in batches of like length, in random batches, and padded to `max_length`.

320 training sentences of `reviews` in batches of 32. "like length": as `BucketBatchSampler` deals them out;
"random": in random order, padded to the longest of the batch; "to 64": the same random batches, padded to 64 tokens.
Timed over all batches: MiniLM-L6 predicting, and a training step (cross-entropy, AdamW) of each student.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.common import Measure, interleave, ratios
from benchmarks.task import STUDENTS, optimizer, reviews, student, teacher_network
from kd_lightning.data.sampler import BucketBatchSampler
from kd_lightning.data.text.dataset import TokenDataset
from kd_lightning.models.adapt import run_network
from kd_lightning.types import Batch

EXAMPLES, BATCH_SIZE = 320, 32
NOTE = f"{EXAMPLES} sentences, batches of {BATCH_SIZE}"


def run() -> list[Measure]:
    """Compare the three."""
    batches = batches_by_padding()
    measures = [
        Measure(f"padding, {name}", [padding_share(given)], "share of tokens", note=NOTE)
        for name, given in batches.items()
    ]
    work: dict[str, Callable[[list[Batch]], None]] = {"MiniLM-L6 answers": partial(predict, teacher_network())}
    for name in STUDENTS:
        network = student(name)
        work[f"{name} trains"] = partial(train, network, optimizer()(network.parameters()))
    for what, do in work.items():
        seconds = interleave({name: partial(do, given) for name, given in batches.items()})
        for slower in ("to 64", "random"):
            values = ratios(seconds["like length"], seconds[slower])
            measures.append(Measure(f"{what}: like length / {slower}", values, "ratio", note=NOTE))
    return measures


def batches_by_padding() -> dict[str, list[Batch]]:
    """Return the same sentences batched in three ways."""
    data = reviews(BATCH_SIZE)
    dataset = data.train_dataloader().dataset
    assert isinstance(dataset, TokenDataset)
    chosen = np.random.default_rng(0).permutation(len(dataset))[:EXAMPLES]
    alike = BucketBatchSampler(dataset.lengths[chosen], BATCH_SIZE, shuffle=True)
    random = [dataset[positions] for positions in chosen.reshape(-1, BATCH_SIZE)]
    return {
        "like length": [dataset[chosen[positions]] for positions in alike],
        "random": random,
        "to 64": [{name: widened(entry, data.max_length) for name, entry in batch.items()} for batch in random],
    }


def widened(entry: torch.Tensor, width: int) -> torch.Tensor:
    """Return token entries `(B, L)` padded to `(B, width)` with zeros, MiniLM's padding; others as they are."""
    return nn.functional.pad(entry, (0, width - entry.shape[1])) if entry.ndim == 2 else entry


def padding_share(batches: list[Batch]) -> float:
    """Return how many of the tokens are padding."""
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def predict(network: nn.Module, batches: list[Batch]) -> None:
    """Ask a teacher."""
    with torch.inference_mode():
        for batch in batches:
            run_network(network, batch)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    """Train a student for an epoch, from labels."""
    network.train()
    for batch in batches:
        nn.functional.cross_entropy(run_network(network, batch).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
