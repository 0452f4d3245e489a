"""`kd-eval`: score a finished run again, on its own test split or on another file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.types import Batch, ModelOutput


def answers(
    answer: Callable[[Batch], ModelOutput], batches: Iterable[Batch], device: torch.device | None = None
) -> dict[str, Tensor]:
    """Collect a model's answers over batches, in the order of the batches.

    Returns:
        `logits` `(N, C)` float32, `labels` `(N,)` and `index` `(N,)`, on the CPU.
    """
    logits, labels, index = [], [], []
    with torch.inference_mode():
        for batch in batches:
            moved = {key: value.to(device) for key, value in batch.items()} if device else batch
            logits.append(answer(moved).logits.float().cpu())
            labels.append(batch["labels"])
            index.append(batch["index"])
    return {"logits": torch.cat(logits), "labels": torch.cat(labels), "index": torch.cat(index)}


def network_answers(
    network: nn.Module, batches: Iterable[Batch], device: torch.device | None = None
) -> dict[str, Tensor]:
    """Collect a network's answers in eval mode; see `answers`. The network's training mode is left as it was."""
    training = network.training
    network.eval()
    try:
        return answers(lambda batch: run_network(network, batch), batches, device)
    finally:
        network.train(training)
