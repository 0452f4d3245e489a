"""Bi-encoders: query and document are embedded apart, and their cosine is the score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.adapt import run_network
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import ModelOutput


class BiEncoder(nn.Module):
    r"""A sentence encoder that scores a query and a document which it never sees together.

    .. math:: s(q, d) = a \cos(z_q, z_d)

    It reads what a cross-encoder reads, `[CLS] query [SEP] document [SEP]`, and takes it apart at its token types into
    `[CLS] query [SEP]` and `[CLS] document [SEP]`, as a tokenizer writes either alone. So a pair is one row of the
    data, the cache, `kd-predict` and an export for whatever network, and still each document's embedding is what it is
    without a query: documents can be embedded beforehand. Only where a pair is longer than `max_length`, a document is
    cut sooner than alone.

    Args:
        network: Embeds a text: `(B, L)` token ids to `(B, D)`.
        pad_token_id: The padding id.
        scale: a, which turns cosines into scores: 20 is a softmax at the temperature 0.05.

    Raises:
        ConfigError: A scale that is not positive and finite, or a padding id below 0.
    """

    VERSION = 1
    feature_names: Mapping[str, str] = {}
    """None: what is inside sees the different texts of a batch, each once, queries apart from documents."""

    def __init__(self, network: nn.Module, pad_token_id: int = 0, scale: float = 20.0) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ConfigError(f"scale={scale}: expected a number above 0")
        if pad_token_id < 0:
            raise ConfigError(f"pad_token_id={pad_token_id} is below 0")
        self.network = network
        self.arguments: dict[str, Any] = {"pad_token_id": pad_token_id, "scale": scale}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ModelOutput:
        """Score a batch of pairs, `(B, L)`: `(B, 1)`.

        Raises:
            ConfigError: They have no token types.
        """
        if token_type_ids is None:
            raise ConfigError(
                "a bi-encoder takes query and document apart at their token types (token_type_ids), which this "
                "tokenizer does not give: use one of BERT's, such as data.tokenizer=minilm, or another student"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        query, document = (self.embed(*part) for part in self.apart(input_ids, token_type_ids, mask.bool()))
        scale: float = self.arguments["scale"]
        return ModelOutput(scale * (query * document).sum(1, keepdim=True))

    def apart(self, ids: Tensor, types: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the queries and the documents of pairs, each as ids and a mask `(B, L)` bool.

        Args:
            ids: Pairs, padded on the right, `(B, L)`.
            types: 1 for the tokens of the documents.
            mask: True for tokens.
        """
        of_query, of_document = mask & (types == 0), mask & (types == 1)
        place = torch.arange(ids.shape[1], device=ids.device)
        behind = (of_query.sum(1, keepdim=True) + place - 1).clamp(max=ids.shape[1] - 1)
        document = ids.gather(1, behind.masked_fill(place == 0, 0))
        there = place <= of_document.sum(1, keepdim=True)
        pad = self.arguments["pad_token_id"]
        return [(rows.masked_fill(~own, pad), own) for rows, own in ((ids, of_query), (document, there))]

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings of texts, of length 1, `(B, D)`; equal texts are embedded once."""
        if torch.compiler.is_compiling():  # a graph, also of torch.export, has no sizes of its own
            return F.normalize(self._run(ids, mask), dim=1)
        ids, mask = (part[:, : int(mask.sum(1).max())] for part in (ids, mask))
        texts, place = torch.unique(ids.masked_fill(~mask, -1), dim=0, return_inverse=True)
        mask = texts >= 0
        embedded = self._run(texts.masked_fill(~mask, self.arguments["pad_token_id"]), mask)
        return F.normalize(embedded, dim=1)[place]

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        return run_network(self.network, {"input_ids": ids, "attention_mask": mask.long()}).logits
