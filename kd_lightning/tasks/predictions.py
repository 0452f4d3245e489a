"""What a model says of a whole split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.types import Batch, ModelOutput


@dataclass(frozen=True)
class Answers:
    """A model's logits over a split, in the order of the examples' `index`, on the CPU.

    Attributes:
        index: `(N,)` int64, ascending.
        logits: `(N, C)` float32.
        labels: `(N,)` int64; float32 for a regression.
        task: `(N,)` int64, which of several tasks each example is of; None where there is one.
    """

    index: Tensor
    logits: Tensor
    labels: Tensor
    task: Tensor | None = None


def answers(
    model: Callable[[Batch], ModelOutput], batches: Iterable[Batch], device: torch.device | str = "cpu"
) -> Answers:
    """Collect what a model (a teacher, or anything from batch to output) says of every example."""
    found: defaultdict[str, list[Tensor]] = defaultdict(list)
    with torch.inference_mode():
        for batch in batches:
            output = model({key: value.to(device) for key, value in batch.items()})
            found["logits"].append(output.logits.float().cpu())
            for name in ("index", "labels", "task"):
                if name in batch:
                    found[name].append(batch[name])
        joined = {key: torch.cat(values) for key, values in found.items()}
        order = joined["index"].argsort()
        return Answers(**{key: values[order] for key, values in joined.items()})


def network_answers(network: nn.Module, batches: Iterable[Batch], device: torch.device | str = "cpu") -> Answers:
    """Collect what a network says in eval mode; its own mode is given back afterwards."""
    training = network.training
    network.to(device).eval()
    try:
        return answers(lambda batch: run_network(network, batch), batches, device)
    finally:
        network.train(training)
