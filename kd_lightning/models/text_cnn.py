"""A convolutional text classifier: detectors of short runs of words, over word embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.models.bilstm import EMBEDDING_RMS
from kd_lightning.models.sizes import check_padding, check_sizes
from kd_lightning.types import ModelOutput


class TextCNN(nn.Module):
    """Embedding, convolutions of several widths, maximum over the words, linear classifier.

    Kim 2014, arXiv 1408.5882. A convolution of width k covers k neighbouring words, with zeros beyond the text;
    padding never affects a word. `kernel_sizes=[1]` is a bag of embeddings, without word order.

    Initialisation: embeddings N(0, 0.1^2) with a zero padding row, the rest is torch's.

    Features (see `models.features`): `embeddings`, also called `hidden[0]`, the word embeddings; `pooled`, before
    dropout.

    Args:
        num_classes: Number of classes C.
        vocab_size: Number of token ids V.
        pad_token_id: The padding id.
        embedding_size: Width of the word embeddings.
        num_filters: Filters of each width.
        kernel_sizes: Widths in words.
        dropout: Probability of dropping an entry of the embeddings and of the classifier's input.

    Raises:
        ConfigError: A size below 1, no width, a dropout outside [0, 1), a padding id beyond the vocabulary.
    """

    VERSION = 1

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        pad_token_id: int = 0,
        embedding_size: int = 128,
        num_filters: int = 128,
        kernel_sizes: Sequence[int] = (1, 2, 3),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        kernel_sizes = list(kernel_sizes)
        self.arguments: dict[str, Any] = {
            "num_classes": num_classes,
            "vocab_size": vocab_size,
            "pad_token_id": pad_token_id,
            "embedding_size": embedding_size,
            "num_filters": num_filters,
            "kernel_sizes": kernel_sizes,
            "dropout": dropout,
        }
        check_sizes(
            dropout, num_classes=num_classes, vocab_size=vocab_size, embedding_size=embedding_size,
            num_filters=num_filters, kernel_sizes=min(kernel_sizes or [0]),
        )  # fmt: skip
        check_padding(pad_token_id, vocab_size)
        self.pad_token_id = pad_token_id
        self.embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=pad_token_id)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_RMS)
        with torch.no_grad():
            self.embedding.weight[pad_token_id].zero_()
        self.shown = nn.Identity()  # the convolutions' input passes through it, for hooks
        self.feature_names = {"hidden[0]": "shown", "embeddings": "shown"}
        self.convolutions = nn.ModuleList(
            nn.Conv1d(embedding_size, num_filters, size, padding=size // 2) for size in kernel_sizes
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(num_filters * len(kernel_sizes), num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """Classify a batch.

        Args:
            input_ids: `(B, L)` token ids.
            attention_mask: `(B, L)`, nonzero where there is a word; padding may be on either side. By default
                everything but `pad_token_id`.

        Returns:
            Logits `(B, C)`.
        """
        mask = input_ids.ne(self.pad_token_id) if attention_mask is None else attention_mask.ne(0)
        words = self.shown(self.embedding(input_ids).masked_fill(~mask.unsqueeze(2), 0.0))
        words = self.dropout(words).transpose(1, 2)  # (B, E, L)
        # At padding the detectors output 0, as a ReLU does without a match; also in an empty text.
        detected = [layer(words)[:, :, : mask.shape[1]].relu() * mask.unsqueeze(1) for layer in self.convolutions]
        found = [one.amax(2) for one in detected]
        return ModelOutput(self.classifier(self.dropout(torch.cat(found, dim=1))))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the word embeddings, under the name `transformers` gives this method."""
        return self.embedding
