"""The teacher that has answered: one pass over the examples, then a look-up by `index`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_lightning.errors import CacheError
from kd_lightning.files import replacing
from kd_lightning.models.answers import Answers
from kd_lightning.types import Batch, ModelOutput


class CachedTeacher:
    """Answers from a table of logits, one row an example.

    Args:
        logits: `(N, C)`; row i is the teacher's answer to the example whose `index` is i.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the stored logits of the batch's examples."""
        return ModelOutput(self.logits[batch["index"]])

    def to(self, device: torch.device) -> Self:
        """Move the table to a device."""
        self.logits = self.logits.to(device)
        return self


def teacher_logits(path: Path, fingerprint: str, num_examples: int, ask: Callable[[], Answers]) -> Tensor:
    """Return the teacher's logits for every example: read from `path`, or asked for once and written there.

    Args:
        path: A safetensors file.
        fingerprint: Says which teacher answered which examples; a file with another one is refused.
        num_examples: N, the rows of the table.
        ask: Has the teacher answer all examples.

    Returns:
        `(N, C)` float32.

    Raises:
        CacheError: The file is damaged or belongs to another teacher or other data, or examples were left out.
    """
    if path.exists():
        return _read(path, fingerprint, num_examples)
    said = ask()
    if not torch.equal(said.index, torch.arange(num_examples)):
        raise CacheError(f"the teacher was shown {len(said.index)} examples, not each of {num_examples} once")
    with replacing(path) as temporary:
        save_file({"logits": said.logits}, temporary, metadata={"fingerprint": fingerprint})
    return said.logits


def _read(path: Path, fingerprint: str, num_examples: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("fingerprint")
            logits: Tensor = file.get_tensor("logits")
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} cannot be read ({error}); remove it to have the teacher answer again") from error
    if found != fingerprint or logits.shape[0] != num_examples:
        raise CacheError(
            f"{path} holds the answers of another teacher or to other data; remove it, or set teacher.cache=off"
        )
    return logits
