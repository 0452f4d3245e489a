"""Holds a served model against what is stored under its name, before more is stored there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.models.served import ServedLM
from kd_lightning.runtime.errors import CacheError
from kd_lightning.types import ModelOutput

if TYPE_CHECKING:
    from kd_lightning.data import IndexedData
    from kd_lightning.teachers import Teacher
    from kd_lightning.teachers.cache.store import TeacherCache

LEAST_SAME, MOST_APART = 0.9, 0.1
"""The share of tokens with the same likeliest one, and how far its log probability may be on average."""


def check_served(teacher: Teacher, network: nn.Module, cache: TeacherCache, data: IndexedData) -> None:
    """Compare a served model with an example that is stored already; do nothing for a loaded one.

    Args:
        teacher: As it predicts.
        network: Its network.
        cache: To which more is to be added.
        data: With what it reads.

    Raises:
        CacheError: They are of another model.
    """
    if not isinstance(network, ServedLM) or not cache.stored or cache.complete:
        return
    known = torch.arange(data.num_examples)
    at = int(known[cache.known(known)][0])
    loader: Any = data.all_dataloader()
    batch = loader.dataset[np.array([at])]
    rows = data.task.compared(batch)
    stored = cache.lookup(batch["index"], batch["attention_mask"], (), batch.get("keep"))
    (before, was), (now, becomes) = (_first(output, rows["keep"]) for output in (stored, teacher(batch)))
    same, apart = float((before == now).float().mean()), float((was - becomes).abs().mean())
    if same < LEAST_SAME or apart > MOST_APART:
        raise CacheError(
            f"{cache.folder} holds the outputs of another teacher.model={network.server.model}: of example {at} "
            f"{same:.0%} of the likeliest tokens are the same, their log probabilities {apart:.2f} apart; give this "
            "one another name, or set teacher.cache=refresh"
        )


def _first(output: ModelOutput, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token of each row and its log probability, `(N,)`."""
    if output.sparse is None:
        log_p, ids = output.logits[keep].log_softmax(-1).max(-1)
        return ids, log_p
    rows = output.sparse.at(keep.to(output.sparse.device))
    return rows.likeliest, rows.values.amax(-1)
