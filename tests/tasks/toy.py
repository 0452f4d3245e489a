"""A task of tokens, as small as the protocol allows."""

from __future__ import annotations

from torch import Tensor, nn

from kd_lightning.tasks import Classification
from kd_lightning.types import Batch


class Tagging(Classification):
    """One of C classes for each of the tokens that the data keep."""

    def compared(self, batch: Batch) -> Batch:
        """Return the batch as it is: labels and `keep` are the data's, one for each token."""
        assert batch["keep"].shape == batch["labels"].shape
        return batch


class Tagger(nn.Module):
    """Logits of each token, `(..., C)` for ids `(...)`."""

    def __init__(self, words: int, classes: int, width: int = 6) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, width), nn.Linear(width, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids).tanh())
        return logits
