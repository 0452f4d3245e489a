"""What a model outputs for a whole split, for tests that compare logits one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.evaluation.evaluator import image_batches, text_batches
from kd_lightning.models.adapt import run_network
from kd_lightning.tasks.evaluation import of_network
from kd_lightning.training.run_folder import TrainedModel
from kd_lightning.types import Batch, ModelOutput


class Outputs(NamedTuple):
    """Logits `(N, C)` and labels `(N,)`, in the order of `index`."""

    logits: Tensor
    labels: Tensor


def outputs_of(model: Callable[[Batch], ModelOutput], batches: Iterable[Batch]) -> Outputs:
    """Return what a model (a teacher, ...) outputs for every example."""
    with torch.inference_mode():
        found = [(batch["index"], model(batch).logits.float(), batch["labels"]) for batch in batches]
    index, logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
    order = index.argsort()
    return Outputs(logits[order], labels[order])


def network_outputs(network: nn.Module, batches: Iterable[Batch]) -> Outputs:
    """Return what a network outputs for every example."""
    return outputs_of(of_network(network), batches)


def text_logits(model: TrainedModel, texts: Sequence[tuple[str, ...]]) -> Tensor:
    """Return a model's logits of sentences or pairs, in their order."""
    return _in_order(model, text_batches(model, texts))


def image_logits(model: TrainedModel, files: Sequence[Path]) -> Tensor:
    """Return a model's logits of image files, in their order."""
    return _in_order(model, image_batches(model, files))


def _in_order(model: TrainedModel, batches: Iterable[Batch]) -> Tensor:
    with torch.inference_mode():
        found = [(batch["index"], run_network(model.network, batch).logits.float()) for batch in batches]
    index, logits = (torch.cat(part) for part in zip(*found, strict=True))
    return logits[index.argsort()]
