"""Static sentence embeddings: one vector a token, and their mean for a text; there are no layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.adapt import evaluating, run_network
from kd_lightning.models.initialise import Initialise, check_initialise
from kd_lightning.models.sizes import check_padding, check_sizes
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.runtime.fingerprints import network_digest
from kd_lightning.runtime.memoize import shared
from kd_lightning.types import ModelOutput

log = logging.getLogger(__name__)

AT_ONCE = 1024
"""Tokens that the teacher embeds together, each as a text of its own."""
STD = 0.1
"""Of fresh vectors' entries."""


class StaticEmbedding(nn.Module):
    r"""The mean of a text's token vectors, of length 1.

    .. math:: z = \frac{\sum_{l} v_{x_l}}{\| \sum_{l} v_{x_l} \|}

    over the tokens l that are neither padding nor special. Of a text without any it is zero.

    Args:
        num_classes: D, how wide the embedding is.
        vocab_size: Number of token ids V.
        pad_token_id: The padding id.
        special_tokens: Ids that the tokenizer puts around every text: they count nowhere.

    Raises:
        ConfigError: A size below 1, or an id beyond the vocabulary.
    """

    VERSION = 1

    def __init__(
        self, num_classes: int, vocab_size: int, pad_token_id: int = 0, special_tokens: Sequence[int] = ()
    ) -> None:
        super().__init__()
        check_sizes(0.0, num_classes=num_classes, vocab_size=vocab_size)
        for token in (pad_token_id, *special_tokens):
            check_padding(token, vocab_size)
        self.arguments: dict[str, Any] = {
            "num_classes": num_classes, "vocab_size": vocab_size, "pad_token_id": pad_token_id,
            "special_tokens": list(special_tokens),
        }  # fmt: skip
        self.embedding = nn.Embedding(vocab_size, num_classes)
        counted = torch.ones(vocab_size)
        counted[[pad_token_id, *special_tokens]] = 0.0
        self.register_buffer("counted", counted.unsqueeze(1), persistent=False)
        nn.init.normal_(self.embedding.weight, std=STD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """Embed a batch of `(B, L)` token ids: `(B, D)`."""
        weights = F.embedding(input_ids, self.get_buffer("counted"))
        if attention_mask is not None:
            weights = weights * attention_mask.unsqueeze(2)
        return ModelOutput(F.normalize((self.embedding(input_ids) * weights).sum(1), dim=-1))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token vectors, under the name `transformers` gives this method."""
        return self.embedding


def static_embedding(
    teacher: nn.Module,
    num_classes: int,
    vocab_size: int,
    pad_token_id: int = 0,
    special_tokens: Sequence[int] = (),
    single_token: Sequence[int] = (),
    sif: float = 1e-4,
    initialise: Initialise = "teacher",
) -> nn.Module:
    r"""Build a static student from what the teacher outputs for each token alone.

    The teacher embeds each token of the vocabulary as a text of its own; these vectors are centred and reduced to their
    leading D principal components, and each is weighted by how rare its token is,

    .. math:: w_x = \frac{a}{a + p_x}

    (smooth inverse frequency, SIF: Arora, Liang & Ma 2017), where :math:`p_x` follows Zipf's law over the order of the
    vocabulary, the most frequent token first, as Model2Vec has it (Tulkens & van Dongen 2024): WordPiece and byte-pair
    vocabularies are about in that order. Training then moves all vectors.

    Args:
        teacher: What embeds: its first output is `(B, D')`, D' at least D.
        num_classes: D.
        vocab_size: V, of the teacher's tokenizer.
        pad_token_id: The padding id.
        special_tokens: Ids that the tokenizer puts around every text.
        single_token: A text of one token as the tokenizer writes it, -1 in that token's place; empty: the token alone.
        sif: a.
        initialise: `teacher`: as described; `random`: the same network with fresh vectors.

    Raises:
        ConfigError: A teacher whose output is narrower than D.
    """
    check_initialise(initialise)
    if not sif > 0:
        raise ConfigError(f"student.sif={sif} is not above 0")
    student = StaticEmbedding(num_classes, vocab_size, pad_token_id, special_tokens)
    if initialise == "random":
        return student
    template = list(single_token) or [-1]
    key = (network_digest(teacher), vocab_size, template)
    outputs = shared("token outputs", key, lambda: token_outputs(teacher, vocab_size, template))
    if outputs.shape[1] < num_classes:
        raise ConfigError(
            f"data.dimensions={num_classes} is above the teacher's width, {outputs.shape[1]}: a static student has at "
            "most as many"
        )
    with torch.no_grad():
        rows = outputs.double()
        rows = rows - rows.mean(0)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        kept = float(values.flip(0)[:num_classes].sum() / values.sum())
        log.info("static embeddings: %d principal components hold %.1f%% of the variance", num_classes, 100 * kept)
        same = outputs.shape[1] == num_classes  # a rotation would only take them out of the teacher's space
        reduced = rows if same else rows @ vectors.flip(1)[:, :num_classes]
        rank = torch.arange(vocab_size, dtype=torch.float64) + 2
        chance = (1 / rank) / (1 / rank).sum()
        student.embedding.weight.copy_(reduced * (sif / (sif + chance)).unsqueeze(1))
    return student


@torch.no_grad()
def token_outputs(teacher: nn.Module, vocab_size: int, template: Sequence[int]) -> Tensor:
    """Return what a network outputs for each token as a text of its own, `(V, D)` float32 on the CPU.

    Args:
        teacher: The network, in eval mode meanwhile.
        vocab_size: V.
        template: The text, -1 where the token stands.
    """
    device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
    found = []
    with evaluating(teacher):
        for tokens in torch.split(torch.arange(vocab_size, device=device), AT_ONCE):
            ids = torch.tensor(template, device=device).expand(len(tokens), -1)
            ids = torch.where(ids < 0, tokens.unsqueeze(1), ids)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found.append(run_network(teacher, batch).logits.float().cpu())
    return torch.cat(found)
